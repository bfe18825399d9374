"""A run so small that it can be killed a hundred times, or last ten thousand steps: its settings, data and process."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt2fast import train
from gpt2fast.command import run_main
from gpt2fast.data import shards
from gpt2fast.weights import checkpoint
from tests.tools import programs
from tests.tools.programs import Program

FLAGS = (
    "nano", "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16", "--model.block-size", "16",
    "--batch-size", "2", "--seq-len", "16", "--total-batch", "64", "--warmup", "2", "--lr", "1e-2", "--data", "data",
    "--device", "cpu", "--precision", "fp32", "--compile", "off", "--deterministic", "--val-every", "0",
    "--sample-every", "0",
)  # fmt: skip


def write_data(folder: Path, tokens: int = 3000) -> None:
    """Two training shards and one for validation, of token pairs: after 2k comes 2k + 1."""
    random = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for name, n in (("train_0", tokens // 3), ("train_1", tokens - tokens // 3), ("val", 200)):
        first = 2 * random.integers(0, 100, n // 2)
        pairs = np.stack([first, first + 1], 1).ravel().astype(np.uint16)
        shards.write_shard(folder / "data" / f"{name}.bin", pairs)


def start(folder: Path, *flags: str, do: Callable[[Sequence[str]], int] = train.main) -> Program | subprocess.Popen:
    """`python -m gpt2fast.train *flags` in `folder`, with one thread; what it says goes to the file `log` there."""
    return programs.call(run_main_of, do, flags, cwd=folder, log=folder / "log", env={"OMP_NUM_THREADS": "1"})


def run_main_of(do: Callable[[Sequence[str]], int], flags: Sequence[str]) -> None:
    sys.argv[1:] = flags
    run_main(do)


def said(folder: Path) -> str:
    """The end of what the processes in `folder` said."""
    path = folder / "log"
    return path.read_text()[-1500:] if path.exists() else "nothing"


def newest(checkpoints: Path) -> tuple[int, Path]:
    """Step and folder of the newest checkpoint, which is there."""
    return checkpoint.list_checkpoints(checkpoints)[-1]
