"""Losses and speed of several processes compared with one: `python -m tests.long.ranks` runs torchrun with 1, 2 and 4.

Each run has the same tokens in each step: one process accumulates as many micro-batches as N processes have together.
Losses and norms are compared step by step, and tokens/s are reported. Each process has one CPU thread, as torchrun sets
it, and one GPU if the machine has any; without a GPU, Triton's kernels are interpreted.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks import flags, harness
from gpt2fast.command import run_main
from gpt2fast.errors import RunError, UserError
from gpt2fast.machine import versions
from gpt2fast.training import run
from tests.tools import tiny

FLAGS = {  # by backend: nano, and a model that is small enough for the interpreter
    "torch": "nano --precision fp32 --total-batch 8192 --steps 10 --warmup 2 --sample-every 0 --val-every 5",
    "triton": f"{shlex.join(tiny.FLAGS)} --model.n-head 1 --total-batch 128 --steps 4 --warmup 1 --val-every 2 "
    "--val-batches 4 --optimizer triton --device auto",
}
INTERPRETED = {"torch": {}, "triton": {"TRITON_INTERPRET": "1"}}
ULP = 2**-23  # fp32's, of numbers between 1 and 2


def train(folder: Path, size: int, backend: str, words: Sequence[str]) -> list[dict]:
    """Train on `size` processes, and return the rows of metrics.jsonl. RunError if the run fails."""
    name = f"{backend}{size}"
    python = [sys.executable, "-m"]
    if size > 1:
        python += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m"]
    command = [*python, "gpt2fast.train", "--", *words, "--backend", backend, "--compile", "off", "--run", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if torch.cuda.is_available() else INTERPRETED[backend])
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-1500:]}")
    return run.read_metrics(folder / "out" / name / "metrics.jsonl")


def numbers(rows: Sequence[dict]) -> list[float]:
    """Return losses, norms and validation losses, in order."""
    return [row[name] for row in rows for name in ("loss", "grad_norm", "val_loss") if name in row]


def compare(rows: Sequence[dict], one: Sequence[dict]) -> dict:
    """Return the largest relative difference from the run of one process, and the speed after the first step."""
    got, expected = numbers(rows), numbers(one)
    if len(got) != len(expected):
        raise RunError(f"one run has {len(got)} losses and norms, the other {len(expected)}: their steps differ")
    worst = max(abs(a - b) / abs(b) for a, b in zip(got, expected))
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "numbers": len(got),
        "largest_relative_difference": worst,
        "in_units_of_fp32": round(worst / ULP, 1),
        "tokens_per_s": statistics.median(speeds[1:] or speeds),
    }


@dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """Train with several numbers of processes, and compare the losses with those of one."""

    sizes: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes; 1 is always included."""
    backend: Literal["torch", "triton"] = "torch"
    """Implementation of the ops."""
    flags: str = ""
    """Flags of gpt2fast.train that override the small run's, as --flags='--steps 4'."""
    file: Path | None = None
    """File to append the rows to. None: a new one in benchmarks/results."""


def main(argv: Sequence[str]) -> None:
    options = flags.parse(RanksConfig, argv, "tests.long.ranks")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < max(options.sizes):
        raise UserError(f"--sizes has {max(options.sizes)} processes and this machine {gpus} GPUs: give at most {gpus}")
    path = options.file or harness.results_file("ranks")
    one: list[dict] = []
    words = [*shlex.split(FLAGS[options.backend]), *shlex.split(options.flags)]
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_data(Path(folder) / "data", n=3000)
        for size in sorted({1, *options.sizes}):
            start = time.monotonic()
            rows = train(Path(folder), size, options.backend, words)
            one = one or rows
            found = {
                "suite": "ranks",
                "status": "ok",
                "processes": size,
                "threads_each": 1,
                "backend": options.backend,
                **compare(rows, one),
            }
            found["seconds"] = round(time.monotonic() - start, 1)
            harness.append_row(path, found | {"flags": shlex.join(words), "machine": versions.record()})
            print(
                f"{size} processes: {found['numbers']} losses and norms differ from one's by at most "
                f"{found['largest_relative_difference']:.1e}, {found['in_units_of_fp32']} units of fp32; "
                f"{found['tokens_per_s']:,.0f} tokens/s",
                flush=True,
            )
    print(f"rows in {path}")


if __name__ == "__main__":
    run_main(main)
