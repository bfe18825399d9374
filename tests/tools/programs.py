"""Our programs as processes: `python -m gpt2fast.train ...`, started by a `server` that has already imported torch.

A program is a real process in all that tests look at: exit code, signals, standard streams, working folder,
environment. But it is not a new interpreter: to test imports, PYTHONPATH or the environment at start-up, use the
fixture fresh_python. On systems other than Linux, every program is a new interpreter.
"""

import base64
import json
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.tools import accounts
from tests.tools.checkout import CHECKOUT, THREADS

LIBRARIES = [
    "torch", "torch._dynamo", "torch._inductor.config", "numpy", "safetensors.torch", "tiktoken", "filelock", "tqdm",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "tyro",
]  # fmt: skip
HANG = 900.0  # seconds that only a hang takes, on any machine
CALL = """
import base64, pickle, sys
module, name, args = pickle.loads(base64.b64decode(sys.argv[1]))
__import__(module)
sys.exit(getattr(sys.modules[module], name)(*args))
"""


def forks() -> bool:
    """Return whether the kernel supports what the server needs."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return a user's environment: ours without what the tests set for themselves, and with the checkout importable."""
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST")  # pytest-benchmark refuses to measure within the latter
    outside = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return outside | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": str(THREADS)} | dict(changes or {})


class Program:
    """`python *argv`, with its output in these files. It is killed when the process that owns this object ends."""

    def __init__(self, argv: list[str], cwd: Path, env: Mapping[str, str], stdout: int, stderr: int):
        accounts.program_starts()
        self._server = connected(interpreted=env.get("TRITON_INTERPRET") == "1")
        request = {"argv": argv, "cwd": os.fspath(cwd), "env": dict(env)}
        with open(os.devnull) as nothing:
            socket.send_fds(self._server, [b"p"], [nothing.fileno(), stdout, stderr])
            self._server.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._server.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float = HANG) -> int:
        """Return the exit code; -N if signal N ended it. subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        ended = self.returncode is not None or select.select([self._server], [], [], 0)[0]
        return self.wait() if ended else None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def connected(interpreted: bool) -> socket.socket:
    """Connect to the server that all processes of this test run share; the first call starts it."""
    name = f"gpt2fast-tests-{accounts.owner()}-{'interpreted' if interpreted else 'plain'}"
    start, process = time.monotonic(), None
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"\0{name}")
            return connection
        except ConnectionRefusedError:  # it does not run yet, or is still importing
            connection.close()
        if process is None:
            command = [sys.executable, str(Path(__file__).with_name("server.py")), name, *LIBRARIES]
            # Triton reads TRITON_INTERPRET when torch._dynamo imports it, and what it has decorated stays as it is
            env = environment({"PYTHONPATH": "", "TRITON_INTERPRET": "1" if interpreted else "0"})
            env |= accounts.of_owner()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
        assert process.poll() in (None, 0), f"{command} ended with {process.poll()}"
        assert time.monotonic() < start + HANG
        time.sleep(0.02)


def start(
    *argv: object, cwd: Path, log: Path | int, env: Mapping[str, str] | None = None
) -> Program | subprocess.Popen:
    """Start `python *argv`, with its output appended to `log`, a path or a file descriptor."""
    with open(log, "ab", closefd=isinstance(log, Path)) as file:
        return _start(list(map(str, argv)), cwd, environment(env), file.fileno(), file.fileno())


def call(
    function: Callable[..., int | None], *args: object, cwd: Path, log: Path, env: Mapping[str, str] | None = None
) -> Program | subprocess.Popen:
    """Start function(*args) as a program whose exit code is the result. The function must be at the top of a module."""
    what = pickle.dumps((function.__module__, function.__qualname__, args))
    return start("-c", CALL, base64.b64encode(what).decode(), cwd=cwd, log=log, env=env)


def _start(argv: list[str], cwd: Path, env: Mapping[str, str], stdout: int, stderr: int) -> Program | subprocess.Popen:
    if forks():
        return Program(argv, cwd, env, stdout, stderr)
    command = [sys.executable, *argv]
    return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


def run(
    *argv: object, cwd: Path, env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess:
    """Run `python *argv` and return exit code and output. `check`: AssertionError unless the exit code is 0."""
    with tempfile.TemporaryFile("w+", newline="") as out, tempfile.TemporaryFile("w+", newline="") as err:
        code = _start(list(map(str, argv)), cwd, environment(env), out.fileno(), err.fileno()).wait(HANG)
        out.seek(0), err.seek(0)
        done = subprocess.CompletedProcess(list(map(str, argv)), code, out.read(), err.read())
    assert not check or code == 0, f"{argv} ended with {code}\n{done.stdout}\n{done.stderr}"
    return done


def until(ready: Callable[[], object], program: Program | subprocess.Popen, log: Path) -> None:
    """Wait for an event that a program causes. AssertionError, with its log, if the program ends first, or hangs."""
    start = time.monotonic()
    while not ready():
        assert program.poll() is None, f"it ended with {program.poll()}: {log.read_text()[-3000:]}"
        assert time.monotonic() < start + HANG, f"nothing happened in {HANG:.0f} s: {log.read_text()[-3000:]}"
        time.sleep(0.01)
