"""Reading damaged files under limits of memory, time and writing, which every reader of foreign files must keep."""

import os
import resource
import signal
import traceback
from contextlib import contextmanager
from pathlib import Path
from random import Random

from gpt2fast.errors import UserError
from tests.tools import damage
from tests.tools.damage import Target

BOUND = 2**28
TIMES = 8  # times a file's size: its bytes, its numbers in fp32, and a copy
SECONDS = 4  # CPU time, which other processes do not use up
WAIT = 300  # seconds of wall time, for a reader that only waits


def run(target: Target, seed: int, work: Path) -> tuple[str, str]:
    """Return ("read" or "refused", why), or ("finding", what was wrong). `work` is empty, before and after."""
    files = target.case(Random(seed))
    return run_case(target, files, work)


def run_case(target: Target, files: damage.Files, work: Path) -> tuple[str, str]:
    size = sum(len(content) for content in files.values() if isinstance(content, bytes))
    case, here = work / "case", os.getcwd()
    damage.write(files, case)
    before = listing(case)
    os.chdir(work)
    try:
        with limits(BOUND + TIMES * size):
            outcome = call(target, case)
        written = listing(case) != before and not target.writes
        others = [path.name for path in work.iterdir() if path != case]
        if written or others:
            outcome = "finding", f"wrote {', '.join(others) or 'into the folder'}"
        return outcome
    finally:
        os.chdir(here)
        clear(work)


def call(target: Target, case: Path) -> tuple[str, str]:
    try:
        target.call(case)
        return "read", ""
    except UserError as error:
        if why := starved(error):
            return "finding", f"memory: {why}, then {error}"
        return "refused", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frame = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "gpt2fast" in f.filename), None)
        place = f"{Path(frame.filename).name}:{frame.name}" if frame else ""
        return "finding", f"{type(error).__name__} in {place}: {' '.join(str(error).split())[:150]}"


def starved(error: BaseException | None) -> str:
    """Return the lack of memory or time that an error of ours hides, "" if none."""
    while error := error.__context__:
        text = str(error)
        if isinstance(error, MemoryError | TimeoutError) or "allocate" in text or "bad_alloc" in text:
            return f"{type(error).__name__} {text[:100]}"
    return ""


@contextmanager
def limits(size: int):
    """Limit the address space to `size` more bytes, CPU time to SECONDS and wall time to WAIT."""

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def listing(folder: Path) -> set[tuple]:
    return {(path.name, (stat := path.lstat()).st_size, stat.st_mtime_ns) for path in folder.iterdir()}


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            clear(path)
            path.rmdir()
        else:
            path.unlink()
