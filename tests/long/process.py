"""A training run as a process, which the programs here kill or measure."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2fast import train
from gpt2fast.command import run_main
from tests.tools import programs
from tests.tools.programs import Program


def start(folder: Path, *flags: str, main: Callable[[Sequence[str]], int] = train.main) -> Program | subprocess.Popen:
    """Start `python -m gpt2fast.train *flags` in `folder`, with one thread and its output in the file `log` there."""
    return programs.call(_run, main, flags, cwd=folder, log=folder / "log", env={"OMP_NUM_THREADS": "1"})


def _run(main: Callable[[Sequence[str]], int], flags: Sequence[str]) -> None:
    sys.argv[1:] = flags
    run_main(main)


def printed(folder: Path) -> str:
    """Return the end of what the processes in `folder` have printed."""
    path = folder / "log"
    return path.read_text()[-1500:] if path.exists() else "nothing"
