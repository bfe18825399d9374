"""However a test run ends, every process that it started ends too; and its resources are printed at the end."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.tools import accounts, programs, watch
from tests.tools.programs import HANG

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")

TEST = """
import os, subprocess, sys, time
from pathlib import Path
from tests.tools import programs

programs.LIBRARIES.clear()  # they are not needed here, and take seconds and memory
SLEEP = "import os, time; os.fork(); time.sleep(10**6)"

def start_and(do):
    # one with a group and session of its own, and one that the server starts
    detached = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    program = programs.start("-c", SLEEP, cwd=Path.cwd(), log=Path("log"))
    Path(f"{os.getpid()}.new").write_text(f"{detached.pid} {program.pid}")
    Path(f"{os.getpid()}.new").rename(f"{os.getpid()}.started")
    do()

def test_a():
    start_and(lambda: time.sleep(10**6))

def test_b():
    start_and(lambda: time.sleep(10**6))

def test_end():
    start_and(lambda: None)
"""


@pytest.fixture
def tests(tmp_path):
    """tests(*options) runs pytest on TEST with the hooks of `accounts` only, and a word that all processes inherit."""
    (tmp_path / "test_a.py").write_text(TEST)
    (tmp_path / "pytest.ini").touch()

    def start(*options):
        word = uuid.uuid4().hex
        env = programs.environment({"TEST_OF_ACCOUNTS": word})
        del env[accounts.OWNER]  # so that it has servers of its own
        command = [sys.executable, "-m", "pytest", "-p", "tests.tools.accounts", "-p", "no:cacheprovider", *options]
        how = {"cwd": tmp_path, "env": env, "stdin": subprocess.DEVNULL, "start_new_session": True}
        # a process that a shell has started in the background ignores SIGINT
        how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, **how)
        return process, word.encode()

    return start


def wait_until(true, log: Path) -> None:
    end = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def marked(word: bytes) -> list[int]:
    return [pid for pid in watch.marked(word) if pid != os.getpid()]


def by_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize(
    "stop",
    [
        by_ctrl_c,
        pytest.param(subprocess.Popen.terminate, marks=pytest.mark.long),
        pytest.param(subprocess.Popen.kill, marks=pytest.mark.long),
    ],
    ids=["Ctrl-C", "SIGTERM", "kill -9"],
)
def test_no_process_is_left(tests, stop, tmp_path):
    process, word = tests("-n", "2", "test_a.py::test_a", "test_a.py::test_b")
    wait_until(lambda: len(list(tmp_path.glob("*.started"))) == 2, tmp_path / "log")
    assert len(marked(word)) > 8  # pytest, its workers, their watches, the server, and what the tests started
    stop(process)
    assert process.wait(HANG) != 0
    wait_until(lambda: marked(word) == [], tmp_path / "log")


@pytest.mark.long
def test_processes_of_a_killed_worker_end(tests, tmp_path):
    process, word = tests("-n", "2", "test_a.py::test_a", "test_a.py::test_b")
    wait_until(lambda: len(list(tmp_path.glob("*.started"))) == 2, tmp_path / "log")
    file = next(tmp_path.glob("*.started"))
    theirs = [Path(f"/proc/{pid}") for pid in file.read_text().split()]
    assert all(path.exists() for path in theirs)
    os.kill(int(file.stem), signal.SIGKILL)
    wait_until(lambda: not any(path.exists() for path in theirs), tmp_path / "log")
    assert process.poll() is None  # xdist starts another worker
    process.kill()
    wait_until(lambda: marked(word) == [], tmp_path / "log")


def test_a_run_that_ends_prints_its_resources_and_leaves_no_process(tests, tmp_path):
    process, word = tests("test_a.py::test_end", "--durations=10")
    assert process.wait(HANG) == 0, (tmp_path / "log").read_text()
    wait_until(lambda: marked(word) == [], tmp_path / "log")
    said = (tmp_path / "log").read_text()
    took = re.search(r"^\d+\.\d minutes, \d\.\d GB of memory at the peak, (\d+) processes started$", said, re.MULTILINE)
    assert took, said
    assert int(took[1]) >= 4  # the watch, the server, and the two of the test
    assert "slowest 10 durations" in said


def test_processes_are_counted(monkeypatch):
    before = accounts.started
    subprocess.run(["true"], check=True)
    accounts.program_starts()
    assert accounts.started == before + 2
