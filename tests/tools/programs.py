"""Programs of ours as processes: `python -m gpt2fast.train ...`, started by a `server` that has imported torch already.

A program is a process in all that tests look at: exit code, signals, standard streams, working folder, environment.
What it is not is a new interpreter: where imports, PYTHONPATH or the environment at the start are what is tested, use
the fixture fresh_python. Where there is no Linux, all are new interpreters.
"""

import atexit
import functools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.tools.accounts import program_starts
from tests.tools.checkout import CHECKOUT, THREADS

FORKS = hasattr(os, "pidfd_open")
LIBRARIES = [
    "torch", "torch._dynamo", "torch._inductor.config", "numpy", "safetensors.torch", "tiktoken", "filelock", "tqdm",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "tyro",
]  # fmt: skip
HANG = 900.0  # seconds that nothing here takes, on no machine: only what hangs


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A user's: what the tests set for themselves is taken out of ours; the checkout can be imported."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return outside | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": str(THREADS)} | dict(changes or {})


class Program:
    """`python *argv`, its output in these files. Losing this object's process kills it."""

    def __init__(self, argv: list[str], cwd: Path, env: Mapping[str, str], stdout: int, stderr: int):
        program_starts()
        self._here, there = socket.socketpair()
        with open(os.devnull) as nothing, there:
            fds = [there.fileno(), nothing.fileno(), stdout, stderr]
            socket.send_fds(server(env.get("TRITON_INTERPRET") == "1"), [b"p"], fds)
        request = {"argv": argv, "cwd": os.fspath(cwd), "env": dict(env)}
        self._here.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._here.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float = HANG) -> int:
        """The exit code; -N if signal N ended it. subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._here], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(self._answers.readline())
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None as long as it runs."""
        ended = self.returncode is not None or select.select([self._here], [], [], 0)[0]
        return self.wait() if ended else None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@functools.cache
def server(interpreted: bool) -> socket.socket:
    """The control socket of one, which lives as long as this process. `interpreted`: its Triton interprets kernels."""
    here, there = socket.socketpair()
    command = [sys.executable, Path(__file__).with_name("server.py"), *LIBRARIES]
    # Triton asks when it is imported, which torch._dynamo does, and its own functions stay what they then become
    env = environment({"PYTHONPATH": "", "TRITON_INTERPRET": "1" if interpreted else "0"})
    with there:
        process = subprocess.Popen(command, stdin=there, env=env, start_new_session=True)
    atexit.register(process.wait)
    atexit.register(here.close)  # done before the line above
    return here


def start(*argv: object, cwd: Path, log: Path, env: Mapping[str, str] | None = None) -> Program | subprocess.Popen:
    """`python *argv`; what it prints goes to the end of `log`."""
    with log.open("ab") as file:
        return _start(list(map(str, argv)), cwd, environment(env), file.fileno(), file.fileno())


def _start(argv: list[str], cwd: Path, env: Mapping[str, str], stdout: int, stderr: int) -> Program | subprocess.Popen:
    if FORKS:
        return Program(argv, cwd, env, stdout, stderr)
    command = [sys.executable, *argv]
    return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


def run(
    *argv: object, cwd: Path, env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess:
    """`python *argv` to its end -> exit code and what it printed. `check`: AssertionError unless that is 0."""
    with tempfile.TemporaryFile("w+", newline="") as out, tempfile.TemporaryFile("w+", newline="") as err:
        code = _start(list(map(str, argv)), cwd, environment(env), out.fileno(), err.fileno()).wait(HANG)
        out.seek(0), err.seek(0)
        done = subprocess.CompletedProcess(argv, code, out.read(), err.read())
    assert not check or code == 0, f"{argv} ended with {code}\n{done.stdout}\n{done.stderr}"
    return done


def until(ready: Callable[[], object], program: Program | subprocess.Popen, log: Path) -> None:
    """Wait for an event that a program brings about. AssertionError, with its log, if it ends before that, or hangs."""
    start = time.monotonic()
    while not ready():
        assert program.poll() is None, f"it ended with {program.poll()}: {log.read_text()[-3000:]}"
        assert time.monotonic() < start + HANG, f"nothing happened in {HANG:.0f} s: {log.read_text()[-3000:]}"
        time.sleep(0.01)
