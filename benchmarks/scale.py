"""Sizes and lengths: `python -m benchmarks.scale`. Speed, memory, the largest batch, what checkpointing costs.

Each configuration (size, T, activation checkpointing or not) runs in a process of its own: first the largest B that
fits is searched, by doubling and then bisection, uncompiled, which needs a little more than what is compiled; then the
step is timed at B T = `--tokens`, or at the largest B if that is less. Every try is noted before it is made: one that
ends its process (no memory in the machine, a broken device) did not fit, and the search goes on from what is known in a
new one. A process for every try would spend most of a GPU's minutes on starting.

Blocks are compiled one by one, all by one compilation: 48 of them at once take minutes. The share of the floor is the
time of an ideal step (benchmarks/floor.py, at what this device copied and multiplied just before) over the time
measured; with checkpointing the floor stays that of a step without.

On a CPU memory ends where the machine's does, so there `--max-batch` bounds the search, and nothing is compiled:
`python -m benchmarks.scale --size gpt2 --lengths 256` is the price of checkpointing at B=4.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import floor, harness, kernels
from benchmarks.ladder import LEARNING_RATE, endless_batches
from benchmarks.rows import rows_of
from benchmarks.rungs import ALL, FUSED, Rung, refusal, training_step
from gpt2fast import ops
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.machine import versions
from gpt2fast.machine.device import device_name, pick_device, synchronize
from gpt2fast.model import GPT, SIZES
from gpt2fast.training import flops
from gpt2fast.training.screen import percent
from gpt2fast.training.step import TrainingStep, compile_model

LENGTHS = (1024, 512, 2048, 4096)  # what matters most comes first
LEAST_SECONDS = 15.0  # a process is not begun with less


@dataclass(frozen=True)
class Configuration:
    size: str
    T: int
    recompute: bool


def configurations(sizes: Sequence[str], lengths: Sequence[int], both: bool) -> list[Configuration]:
    """First all sizes at the first length, with and without; then the other lengths."""
    flags = (False, True) if both else (False,)
    return [Configuration(size, T, recompute) for T in lengths for recompute in flags for size in sizes]


def rung(recompute: bool, device: torch.device) -> Rung:
    """All of ours on a GPU; elsewhere torch's, uncompiled."""
    fastest = ALL if device.type == "cuda" else replace(FUSED, compile=False)
    return replace(fastest, recompute=recompute)


def probe(good: int, bad: int, most: int) -> int | None:
    """The next B to try where `good` fits and `bad` does not: twice as many, at most `most`, until something did not
    fit, then the middle; None if there is none between."""
    if good + 1 >= bad:
        return None
    return min(2 * good or 1, most) if bad > most else (good + bad) // 2


def bounds(tries: Sequence[dict], most: int) -> tuple[int, int]:
    """The largest B that fitted, the smallest that did not. A try without an outcome was the end of its process."""
    fitted = {one["B"] for one in tries if one.get("fits")}
    failed = {one["B"] for one in tries} - fitted
    return max(fitted, default=0), min(failed, default=most + 1)


def search(fits: Callable[[int], bool], path: Path, most: int) -> None:
    """From what `path` knows until good + 1 = bad; a row before each try and one after."""
    while (B := probe(*bounds(rows_of(path) if path.exists() else [], most), most)) is not None:
        harness.append_row(path, {"B": B})
        harness.append_row(path, {"B": B, "fits": fits(B)})


def fits(take_step: TrainingStep, B: int, T: int, device: torch.device) -> bool:
    """Whether a step of B sequences finds memory; it leaves none behind."""
    try:
        take_step(endless_batches(take_step.model.config.vocab_size, B, T, device), LEARNING_RATE)
        synchronize(device)
        ran = True
    except torch.OutOfMemoryError:
        ran = False  # and here the frames that hold its tensors are gone
    take_step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ran


def ceilings(device: torch.device) -> floor.Ceilings:
    """What it copies and multiplies now."""
    cuda = device.type == "cuda"
    copy = harness.copy_bandwidth(device, kernels.COPY_BYTES if cuda else 2**26)
    matmul = harness.matmul_rate(device, *(kernels.MATMUL if cuda else (1024, 1024, 1024)))
    gc.collect()
    return floor.Ceilings(matmul["tflops"]["median"], copy["gb_per_s"]["median"] / 1e3)


def measure(configuration: Configuration, tries: Path, options: argparse.Namespace, device: torch.device) -> dict:
    """What a process does: the largest B, then speed and memory at B T = tokens."""
    size, T = configuration.size, configuration.T
    limits, way = ceilings(device), rung(configuration.recompute, device)
    take_step = training_step(replace(way, compile=False), size, T, device)
    search(lambda B: fits(take_step, B, T, device), tries, options.max_batch)
    most = bounds(rows_of(tries), options.max_batch)[0]
    row = {"largest_batch": most, "searched_to": options.max_batch}
    if not most:
        return row | {"status": "failed", "why": f"one sequence of {T} tokens does not fit"}
    B = min(most, max(1, options.tokens // T))
    if way.compile:
        plain: GPT = take_step.forward  # type: ignore[assignment]  # or its twin: nothing is compiled yet
        take_step.forward = compile_model(plain, torch.device("cpu"))  # as there: block by block
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    config = take_step.model.config
    batches = endless_batches(config.vocab_size, B, T, device)
    for _ in range(3):
        take_step(batches, LEARNING_RATE)
    times = harness.time_calls(lambda: take_step(batches, LEARNING_RATE), device, options.steps, options.seconds)
    ms, speed = harness.spread([1e3 * t for t in times]), harness.spread([B * T / t for t in times])
    ideal = floor.total(floor.lines(floor.parts(config, B, T), limits)).floor
    peak = flops.peak_flops(device_name(device), way.precision)
    return row | {
        "status": "ok", "B": B, "tokens_per_s": speed, "ms": ms, "steps": len(times), "floor_ms": ideal,
        "floor_share": ideal / ms["median"], "peak_memory": harness.peak_memory(device),
        "mfu": flops.mfu(speed["median"], config, T, peak), "limits": asdict(limits),
    }  # fmt: skip


def run_all(options: argparse.Namespace, device: torch.device, path: Path) -> list[dict]:
    """Each configuration apart, all in turn, again and again; rows are in `path` as soon as they exist."""
    record, rows = versions.record(), []
    end = time.monotonic() + options.budget
    for repetition in range(options.repetitions):
        for configuration in configurations(options.size, options.lengths, not options.plain):
            print(name_of(asdict(configuration)), "...", end=" ", flush=True)
            row = {"suite": "scale", **asdict(configuration), "repetition": repetition}
            row |= apart(configuration, options, device, end) | {"device": str(device), "machine": record}
            harness.append_row(path, row)
            rows.append(row)
            print(outcome(row), flush=True)
    return rows


def apart(configuration: Configuration, options: argparse.Namespace, device: torch.device, end: float) -> dict:
    """A configuration in a process, and in another one where a try was the end of it, while there is time."""
    start = time.monotonic()
    end = min(end, start + options.limit)
    result = {"status": "skipped", "why": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        tries, out, log = (Path(folder) / name for name in ("tries", "row", "log"))
        arguments = ["--tokens", options.tokens, "--max-batch", options.max_batch, "--steps", options.steps]
        arguments += ["--seconds", options.seconds, "--device", device]
        arguments += ["--only", json.dumps(asdict(configuration)), tries, out]
        while (left := end - time.monotonic()) >= LEAST_SECONDS:
            result = harness.run_apart("benchmarks.scale", *arguments, limit=left, log=log)
            made = rows_of(tries) if tries.exists() else []
            if out.exists():
                result = json.loads(out.read_text())
            if out.exists() or result["status"] != "failed" or not made or "fits" in made[-1]:
                break
    return result | {"seconds": round(time.monotonic() - start, 1)}


def name_of(row: dict) -> str:
    return f"{row['size']}, T {row['T']}{', checkpointing' * row['recompute']}"


def outcome(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row.get('why') or ' '.join(row['tail'].split())[-200:]}"
    return f"{row['tokens_per_s']['median']:,.0f} tokens/s at B {row['B']}, largest B {row['largest_batch']}"


def describe(row: dict) -> str:
    """A line of the table."""
    line = f"{name_of(row):<36}"
    if row["status"] != "ok":
        return line + outcome(row)
    most = f"{row['largest_batch']}{'+' * (row['largest_batch'] >= row['searched_to'])}"
    return (
        f"{line}{row['B']:>5}{row['tokens_per_s']['median']:>11,.0f}{row['ms']['median']:>10,.1f}"
        f"{row['peak_memory'] / 1e9:>9.2f}{most:>11}{row['floor_share']:>10.1%}  {percent(row['mfu'])}"
    )


HEAD = f"{'':<36}{'B':>5}{'tokens/s':>11}{'ms':>10}{'peak GB':>9}{'largest B':>11}{'of floor':>10}  MFU"


def medians(rows: Sequence[dict]) -> list[dict]:
    """A row for each configuration: that of the middle of its repetitions."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(name_of(row), []).append(row)
    chosen = []
    for of in found.values():
        ok = sorted((row for row in of if row["status"] == "ok"), key=lambda row: row["ms"]["median"])
        chosen.append(ok[(len(ok) - 1) // 2] if ok else of[-1])
    return chosen


def prices(rows: Sequence[dict]) -> list[str]:
    """What checkpointing costs: of the medians of each size and length that ran both ways at one B."""
    times: dict[tuple, list[tuple[float, float]]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = row["size"], row["T"], row["B"], row["recompute"]
            times.setdefault(key, []).append((row["ms"]["median"], row["peak_memory"]))
    lines = []
    for (size, T, B, recompute), plain in times.items():
        if not recompute and (size, T, B, True) in times:
            (a, a_memory), (b, b_memory) = ([median(x) for x in zip(*v)] for v in (plain, times[size, T, B, True]))
            lines.append(
                f"checkpointing, {size}, B {B}, T {T}: {b / a:.2f} x the time, {b_memory / a_memory:.2f} x the memory"
            )
    return lines


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    p.add_argument("--size", nargs="+", choices=SIZES, help="gpt2 to gpt2-xl on CUDA, else nano")
    p.add_argument("--lengths", type=int, nargs="+", help="T: 512 to 4096 on CUDA, else 128")
    p.add_argument("--tokens", type=int, help="B T of the timed step: 65536 on CUDA, else 1024")
    p.add_argument("--max-batch", type=int, help="where the search ends: 1024 on CUDA, else the timed step's B")
    p.add_argument("--plain", action="store_true", help="only without checkpointing")
    p.add_argument("--repetitions", type=int, default=1, help="turns of all configurations")
    p.add_argument("--steps", type=int, default=10, help="timed steps at most")
    p.add_argument("--seconds", type=float, default=8.0, help="timed seconds at most, but 3 steps")
    p.add_argument("--limit", type=float, default=300.0, help="seconds for a configuration, all its processes")
    p.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    p.add_argument("--device", default="auto")
    p.add_argument("--file", type=Path, help="append the rows to this file instead of a new one of results")
    p.add_argument("--only", nargs=3, help=argparse.SUPPRESS)  # what a process gets
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    options.size = options.size or ([size for size in SIZES if size != "nano"] if cuda else ["nano"])
    options.lengths = options.lengths or (LENGTHS if cuda else (128,))
    options.tokens = 65536 if options.tokens is None and cuda else 1024 if options.tokens is None else options.tokens
    if min(options.lengths) < 1:
        raise UserError(f"--lengths {min(options.lengths)}: it must be at least 1")
    if options.max_batch is None:
        options.max_batch = 1024 if cuda else max(1, options.tokens // min(options.lengths))
    for name in ("tokens", "max_batch", "repetitions", "steps", "seconds", "limit", "budget"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be more than 0")
    if options.only:
        configuration, tries, out = options.only
        row = measure(Configuration(**json.loads(configuration)), Path(tries), options, device)
        Path(out).write_text(json.dumps(row))
        return 0
    way = rung(False, device)
    if why := refusal(way, device):
        raise UserError(why)
    ops.build(way.ops, device.type)  # what cannot run is refused here, once
    path = options.file or harness.results_file("scale")
    print(f"{device_name(device)}; rows in {path}")
    rows = run_all(options, device, path)
    print("\n".join([HEAD, *map(describe, medians(rows)), *prices(rows)]))
    return 0 if all(row["status"] in ("ok", "skipped") for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
