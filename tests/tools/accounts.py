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

MARK = "GPT2FAST_TESTS"
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "tests.program"}
PROC = Path("/proc/self/environ")
started = 0  # processes, by this one
of_workers: list[int] = []
begun = 0.0
peak = Path(os.devnull)


def program_starts() -> None:
    """Counts a process that Python's own audit events do not tell of."""
    sys.audit("tests.program")


def _count(event: str, _: tuple) -> None:
    global started
    started += event in STARTS


def pytest_configure(config: pytest.Config) -> None:
    global begun, peak
    begun = time.monotonic()
    sys.addaudithook(_count)
    if not PROC.exists():
        return
    mark = uuid.uuid4().hex
    os.environ[MARK] = f"{os.environ.get(MARK, '')}/{mark}"
    is_worker = hasattr(config, "workerinput")
    peak = Path(os.devnull) if is_worker else Path(tempfile.mkstemp(prefix="gpt2fast-tests-")[1])
    file = Path(__file__).with_name("watch.py")
    command = [sys.executable, "-ISS", file, str(os.getpid()), mark, "" if is_worker else str(peak)]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def end() -> None:
        watch.stdin.close()
        watch.wait()
        if not is_worker:
            peak.unlink()

    config.add_cleanup(end)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["started"] = started


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    of_workers.append(getattr(node, "workeroutput", {}).get("started", 0))


def pytest_terminal_summary(terminalreporter) -> None:
    """The ten slowest tests are pytest's own to tell, by --durations."""
    bytes_ = int(peak.read_text() or 0) if peak.is_file() else 0
    terminalreporter.section("what it took")
    terminalreporter.write_line(
        f"{(time.monotonic() - begun) / 60:.1f} minutes, "
        f"{bytes_ / 1e9:.1f} GB of memory at the peak, {started + sum(of_workers)} processes started"
    )
