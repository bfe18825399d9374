"""A run so small that it can be killed a hundred times, or last ten thousand steps: its settings, data and process.

Processes are forked from a server that has imported torch, so that one costs a third of a second and not four.
"""

import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from gpt2fast import checkpoint, data, train
from gpt2fast.errors import run_main
from tests.tools.accounts import program_starts

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
        data.write_shard(folder / "data" / f"{name}.bin", pairs)


def start(folder: Path, *flags: str, do: Callable[[Sequence[str]], int] = train.main) -> BaseProcess:
    """`python -m gpt2fast.train *flags` in `folder`, with one thread; what it says goes to the file `log` there."""
    context = get_context("forkserver")
    # the last two are otherwise imported by each process: by its command line, and by --deterministic, in two seconds
    context.set_forkserver_preload(["gpt2fast.train", "tyro", "torch._inductor.config"])
    process = context.Process(target=_run, args=(folder, do, flags), daemon=True)  # ends when we do
    program_starts()
    process.start()
    return process


def _run(folder: Path, do: Callable[[Sequence[str]], int], flags: Sequence[str]) -> None:
    os.chdir(folder)
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv[1:] = flags
    run_main(do)


def said(folder: Path) -> str:
    """The end of what the processes in `folder` said."""
    path = folder / "log"
    return path.read_text()[-1500:] if path.exists() else "nothing"


def newest(checkpoints: Path) -> tuple[int, Path]:
    """Step and folder of the newest checkpoint, which is there."""
    return checkpoint.list_checkpoints(checkpoints)[-1]
