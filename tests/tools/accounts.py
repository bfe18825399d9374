"""What a run of the tests took, said at its end; and that nothing it started outlives it.

Hooks of pytest, which conftest imports. Each pytest process, xdist's workers too, puts a mark of its own into the
environment and has a `watch` beside it, which kills whatever has that mark when the process ends: by itself, by Ctrl-C,
by a timeout or by kill -9.
"""

import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

MARK = "GPT2FAST_TESTS"  # /mark/mark/...: the outermost process's first
OWNER = "GPT2FAST_TESTS_OWNER"  # the mark of the process for which servers of programs are started
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "tests.program"}
started = 0  # processes, by this one
of_workers: list[int] = []
begun = time.monotonic()
peak: Path | None = None  # where `watch` writes the most memory that was taken


def program_starts() -> None:
    """Counts a process that Python's own audit events do not tell of."""
    sys.audit("tests.program")


def _count(event: str, _: tuple) -> None:
    global started
    started += event in STARTS


def mark(measured: Path | None = None) -> subprocess.Popen | None:
    """From now on what this process starts is killed when it ends; its `watch`, where there is /proc."""
    own = uuid.uuid4().hex
    os.environ[MARK] = f"{os.environ.get(MARK, '')}/{own}"
    os.environ.setdefault(OWNER, own)
    if not Path("/proc/self/environ").exists():
        return None
    file = str(Path(__file__).with_name("watch.py"))
    command = [sys.executable, "-ISS", file, str(os.getpid()), own, str(measured or "")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def owner() -> str:
    """The mark of the process that began it all: of this one, if nobody has begun."""
    if OWNER not in os.environ:
        mark()
    return os.environ[OWNER]


def of_owner() -> dict[str, str]:
    """The environment of what may outlive this process, but not the owner."""
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
    """The ten slowest tests are pytest's own to tell, by --durations."""
    gigabytes = int((peak and peak.read_text()) or 0) / 1e9
    terminalreporter.section("what it took")
    terminalreporter.write_line(
        f"{(time.monotonic() - begun) / 60:.1f} minutes, {gigabytes:.1f} GB of memory at the peak, "
        f"{started + sum(of_workers)} processes started"
    )
