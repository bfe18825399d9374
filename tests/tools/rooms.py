"""The test file of each module: tests/<room>/test_<module>.py, where the room is the module's folder."""

from pathlib import Path

from tests.tools.checkout import CHECKOUT

PROGRAMS = ("train", "sample", "evaluate", "prepare", "export", "inspect")
FOLDERS = ("data", "weights", "training", "inference", "machine", "files")  # folders of gpt2fast
# the path of every module, from the checkout's root
FILES = sorted(
    path.relative_to(CHECKOUT).as_posix()
    for pattern in ("gpt2fast/**/*.py", "kernels/*.py", "benchmarks/*.py")
    for path in CHECKOUT.glob(pattern)
    if path.stem != "__init__" and not path.stem.startswith("bench_")
)


def room_of(module: str) -> str:
    """Return a module's room: gpt2fast/training/optim.py -> training; at the top of gpt2fast/, model or programs."""
    path = Path(module)
    if path.parent.as_posix() == "gpt2fast":
        return "programs" if path.stem in (*PROGRAMS, "errors", "command") else "model"
    return path.parent.name


def tests_of(module: str) -> str:
    """Return a module's test file, below tests/: gpt2fast/training/optim.py -> training/test_optim.py."""
    return f"{room_of(module)}/test_{Path(module).stem}.py"
