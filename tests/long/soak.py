"""A check for leaks and slow-downs in long runs: `python -m tests.long.soak` observes thousands of small steps.

It trains in a process with everything that a run does between steps: validation, samples, loss.png, checkpoints, and
samples the process's resident memory, open files, threads and CPU time from /proc. Afterwards it checks four things:
memory does not grow, by the median over the twentieths of the second half (a fragmented heap grows by a tensor's size
now and then, a leak steadily; the slope by least squares, which includes such jumps, is reported too); no more files
and threads are open than early on; a step takes no more CPU time in the last fifth than in the second; metrics.jsonl
has every step once, in order. Other load on the machine makes a step slower, in CPU time too, so the fastest tenth of
each fifth is compared.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from benchmarks import flags, harness
from gpt2fast import train
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.machine import versions
from gpt2fast.training import run
from tests.long import process
from tests.tools import tiny
from tests.tools.programs import Program

PROC = Path("/proc")
MODELS = {
    "small": (
        *tiny.FLAGS, "--model.vocab-size", str(tiny.GPT2_WORDS.vocab_size), "--total-batch", "64", "--compile", "off",
        "--deterministic",
    ),
    "nano": (
        "nano", "--device", "cpu", "--deterministic", "--batch-size", "1", "--seq-len", "64", "--total-batch", "64",
    ),
}  # fmt: skip
SLOWER = 0.1  # share of a step's time that is noise
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds, the resolution of Linux's CPU time: 0.01
BLOCKS = 10  # parts of a fifth of the run
PARTS = 20  # parts of its second half


def sample(pid: int, start: float) -> dict:
    """Read a process's current state from /proc."""
    pages = int((PROC / str(pid) / "statm").read_text().split()[1])
    times = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[11:13]  # user and system
    return {
        "seconds": round(time.monotonic() - start, 3),
        "cpu_seconds": sum(map(int, times)) * TICK,
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir(PROC / str(pid) / "fd")),
        "threads": len(os.listdir(PROC / str(pid) / "task")),
    }


def watch(training: Program | subprocess.Popen, metrics: Path, every: int, total: int) -> list[dict]:
    """Sample the process after each `every` steps until it ends; `step` is the last step in metrics.jsonl."""
    start, samples, last, read = time.monotonic(), [], 0, 0
    bar = tqdm(total=total, unit=" steps", mininterval=0.5)
    while training.poll() is None:
        time.sleep(0.01)
        if not metrics.exists():
            continue
        with metrics.open() as file:
            file.seek(read)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
        read += sum(map(len, lines))  # characters are bytes: the file is ASCII
        steps = [json.loads(line)["step"] for line in lines]
        if steps and steps[-1] // every > last // every:
            try:
                samples.append({"step": steps[-1]} | sample(training.pid, start))
            except (OSError, ValueError, IndexError):  # the process has just ended
                break
        bar.update((steps[-1] if steps else last) - last)
        last = steps[-1] if steps else last
    bar.close()
    training.wait()
    return samples


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope of the line through (x, y) by least squares, and its standard error."""
    x_mean, y_mean = (statistics.fmean(values) for values in zip(*points))
    xx = sum((x - x_mean) ** 2 for x, _ in points)
    b = sum((x - x_mean) * (y - y_mean) for x, y in points) / xx
    rest = sum((y - y_mean - b * (x - x_mean)) ** 2 for x, y in points)
    return b, math.sqrt(rest / (len(points) - 2) / xx)


def step_times(samples: Sequence[dict], low: float, high: float) -> list[float]:
    """Return CPU seconds per step in BLOCKS parts of the run between the shares `low` and `high` of its steps."""
    total = samples[-1]["step"]
    part = [row for row in samples if low * total <= row["step"] <= high * total]
    edges = [part[round(i * (len(part) - 1) / BLOCKS)] for i in range(BLOCKS + 1)]
    pairs = [(a, b) for a, b in itertools.pairwise(edges) if b["step"] > a["step"]]
    return [(b["cpu_seconds"] - a["cpu_seconds"]) / (b["step"] - a["step"]) for a, b in pairs]


def course(samples: Sequence[dict], limit: float) -> dict:
    """Summarize the samples: resident memory every 1000 steps, CPU time per step between these, and the jumps,
    [step, bytes], in which memory grew by more than `limit` from one sample to the next."""
    edges = [samples[0]]
    for row in samples:
        if row["step"] >= edges[-1]["step"] + 1000:
            edges.append(row)
    ms = [1e3 * (b["cpu_seconds"] - a["cpu_seconds"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(edges)]
    rises = [[b["step"], b["rss"] - a["rss"]] for a, b in itertools.pairwise(samples)]
    return {
        "readings": len(samples),
        "rss_each_1000_steps": [row["rss"] for row in edges],
        "cpu_ms_each_1000_steps": [round(each, 2) for each in ms],
        "rss_jumps": [[step, rise] for step, rise in rises if rise > limit],
    }


def judge(samples: Sequence[dict], rows: Sequence[dict], steps: int, limit: float) -> dict:
    """Return a summary of the samples and metrics.jsonl; "faults" lists what is wrong, in words."""
    warm = [row for row in samples if row["step"] >= steps / 5]
    half = [row for row in samples if row["step"] >= steps / 2]
    slope_, error = slope([(row["step"] / 1000, row["rss"]) for row in half])
    edges = [half[round(i * (len(half) - 1) / PARTS)] for i in range(PARTS + 1)]
    growth = statistics.median(
        (b["rss"] - a["rss"]) / (b["step"] - a["step"]) * 1000
        for a, b in itertools.pairwise(edges)
        if b["step"] > a["step"]
    )
    before, after = min(step_times(samples, 0.2, 0.4)), min(step_times(samples, 0.8, 1.0))
    quarter = max(1, len(warm) // 4)  # at the end the least of all samples: an event opens a file for a moment
    held = {
        name: [max(row[name] for row in warm[:quarter]), min(row[name] for row in warm[-quarter:])]
        for name in ("files", "threads")
    }
    found = {
        "rss_per_1000_steps": round(slope_), "rss_standard_error": round(error), "rss_limit": round(limit),
        "rss_steady_growth": round(growth),
        "rss_first": samples[0]["rss"], "rss_half": samples[len(samples) // 2]["rss"], "rss_last": samples[-1]["rss"],
        **held,
        "cpu_ms_second_fifth": before * 1e3, "cpu_ms_last_fifth": after * 1e3,
        "validations": sum("val_loss" in row for row in rows), "samples": sum("sample" in row for row in rows),
        **course(samples, limit),
    }  # fmt: skip
    faults = []
    if growth > limit:
        faults.append(f"memory grows by {growth:,.0f} bytes in 1000 steps, more than {limit:,.0f}")
    faults += [f"open {name} grew from {a} to {b}" for name in ("files", "threads") for a, b in [found[name]] if b > a]
    rounding = 2 * TICK / (steps / 5 / BLOCKS)
    if after - before > SLOWER * before + rounding:
        faults.append(f"a step took {before * 1e3:.2f} ms of CPU time, and later {after * 1e3:.2f}")
    if [row["step"] for row in rows if "loss" in row] != list(range(1, steps + 1)):
        faults.append(f"metrics.jsonl does not have each of {steps} steps once, in order")
    return found | {"faults": faults}


def soak(folder: Path, model: str, steps: int, every: int, limit: float, main: Callable[..., int]) -> dict:
    """Train for `steps` steps in `folder`, with an event of each kind every `every` steps, and judge the run."""
    tiny.write_data(folder / "data", n=3000)
    words = ["--val-every", every, "--val-batches", 2, "--sample-every", every, "--sample-tokens", 4]
    words += ["--checkpoint-every", every, "--keep", 2, "--steps", steps, "--run", "soak"]
    training = process.start(folder, *MODELS[model], *map(str, words), main=main)
    out = folder / "out" / "soak"
    samples = watch(training, out / "metrics.jsonl", max(1, every // 4), steps)
    if training.returncode:
        raise UserError(f"the run ended with {training.returncode}: {process.printed(folder)}")
    kept = [path.name for path in (out / "checkpoints").iterdir()]
    found = judge(samples, run.read_metrics(out / "metrics.jsonl"), steps, limit)
    if len(kept) != 2:
        found["faults"].append(f"checkpoints/ has {len(kept)} folders, not 2: {', '.join(sorted(kept))}")
    return {"model": model, "steps": steps, "every": every, **found}


def describe(found: dict) -> str:
    return "\n".join([
        f"memory  {found['rss_steady_growth'] / 2**10:+,.1f} KiB in 1000 steps, slope "
        f"{found['rss_per_1000_steps'] / 2**10:+,.1f}, standard error {found['rss_standard_error'] / 2**10:,.1f}; "
        f"{found['rss_first'] / 2**20:,.1f} MiB at the first sample, "
        f"{found['rss_half'] / 2**20:,.1f} half-way, {found['rss_last'] / 2**20:,.1f} at the last",
        *(f"{name:<8}{found[name][0]} early on, {found[name][1]} at the end" for name in ("files", "threads")),
        f"step    {found['cpu_ms_second_fifth']:.2f} ms of CPU time in the second fifth, "
        f"{found['cpu_ms_last_fifth']:.2f} in the last",
        *(f"FAULT   {fault}" for fault in found["faults"]),
    ])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Train for thousands of steps, and judge memory, files, threads and speed."""

    model: Literal["small", "nano"] = "small"
    """Model; nano is the preset, in small batches."""
    steps: int = 5000
    """Optimizer steps."""
    every: int = 100
    """Steps between events."""
    limit: float = 1024
    """KiB by which memory may grow in 1000 steps."""
    file: Path | None = None
    """File to append the row to. None: a new one in benchmarks/results."""


def main(argv: Sequence[str], trains: Callable[[Sequence[str]], int] = train.main) -> int:
    options = flags.parse(SoakConfig, argv, "tests.long.soak")
    if not (PROC / "self" / "statm").exists():
        raise UserError("/proc/self/statm is missing, where memory is read: run this on Linux")
    if options.every < 1 or options.steps < 10 * options.every:
        raise UserError(f"--steps is {options.steps} and --every {options.every}: they must make at least ten events")
    path = options.file or harness.results_file("soak")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.model, options.steps, options.every, options.limit * 2**10, trains)
    seconds = round(time.monotonic() - start, 1)
    harness.append_row(path, {"suite": "soak", "seconds": seconds, **found, "machine": versions.record()})
    print(describe(found))
    print(f"{options.steps} steps in {seconds:,.0f} s; row in {path}")
    return int(bool(found["faults"]))


if __name__ == "__main__":
    run_main(main)
