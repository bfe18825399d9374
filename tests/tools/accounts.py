"""The time, memory and processes that a test run took, printed at its end; and no process outlives the run.

These are pytest hooks, which conftest imports. Each pytest process, also an xdist worker, puts a mark of its own into
the environment and starts a `watch`, which kills all processes with that mark when the pytest process ends: normally,
by Ctrl-C, by a timeout or by kill -9.
"""

import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

MARK = "GPT2FAST_TESTS"  # /mark/mark/..., the outermost process's first
OWNER = "GPT2FAST_TESTS_OWNER"  # the mark of the outermost process, for which servers of programs are started
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "tests.program"}
started = 0  # processes started by this one
of_workers: list[int] = []
start = time.monotonic()
peak: Path | None = None  # where `watch` writes the peak memory


def program_starts() -> None:
    """Count a process for which Python raises no audit event."""
    sys.audit("tests.program")


def _count(event: str, _: tuple) -> None:
    global started
    started += event in STARTS


def mark(measured: Path | None = None) -> subprocess.Popen | None:
    """Mark all processes started from now on, to be killed when this one ends. Return its `watch`; None: no /proc."""
    own = uuid.uuid4().hex
    os.environ[MARK] = f"{os.environ.get(MARK, '')}/{own}"
    os.environ.setdefault(OWNER, own)
    if not Path("/proc/self/environ").exists():
        return None
    file = str(Path(__file__).with_name("watch.py"))
    command = [sys.executable, "-ISS", file, str(os.getpid()), own, str(measured or "")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def owner() -> str:
    """Return the outermost process's mark, which is this one's if there is none yet."""
    if OWNER not in os.environ:
        mark()
    return os.environ[OWNER]


def of_owner() -> dict[str, str]:
    """Return the variable that lets a process outlive this one, but not the owner."""
    before, own, _ = os.environ[MARK].partition(owner())
    return {MARK: before + own}


def pytest_configure(config: pytest.Config) -> None:
    global peak
    sys.addaudithook(_count)
    if not hasattr(config, "workerinput"):
        peak = Path(tempfile.mkstemp(prefix="gpt2fast-tests-")[1])
    watch = mark(peak)

    def end() -> None:
        if watch and watch.stdin:
            watch.stdin.close()
            watch.wait()
        if peak:
            peak.unlink()

    config.add_cleanup(end)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["started"] = started


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    of_workers.append(getattr(node, "workeroutput", {}).get("started", 0))


def pytest_terminal_summary(terminalreporter) -> None:
    """Print time, memory and processes. (The slowest tests are printed by pytest's --durations.)"""
    gigabytes = int((peak and peak.read_text()) or 0) / 1e9
    terminalreporter.section("resources")
    terminalreporter.write_line(
        f"{(time.monotonic() - start) / 60:.1f} minutes, {gigabytes:.1f} GB of memory at the peak, "
        f"{started + sum(of_workers)} processes started"
    )
