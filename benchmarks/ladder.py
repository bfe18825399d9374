"""Training tokens/s, one rung at a time: `python -m benchmarks.ladder`.

The rungs are those of benchmarks/rungs.py: from fp32 to our kernels each is the one before plus one thing. `--rungs
fused layer_norm ...` swaps single ops instead; `--rungs triton +residual ... all all_but_residual ... graph` adds and
takes away options of ours. All do the same work: the same initial weights and the same tokens (seeded random ids,
since speed does not depend on the text), so their first losses must agree. Each runs in its own process, so that its
peak memory is its own and a crash costs one row. A rung that cannot run here is a row that says why. With `--jobs`
several compile at a time, which is most of a rung's minute on a GPU; they are timed one after the other all the same,
and the few passes of a neighbour that has compiled do not move the median of forty steps.
"""

import argparse
import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock

from benchmarks import harness
from benchmarks.rungs import CLIMB, RUNGS, Rung, refusal, training_step
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.machine import versions
from gpt2fast.machine.device import device_name, pick_device
from gpt2fast.model import SIZES
from gpt2fast.training import flops
from gpt2fast.training.screen import share
from gpt2fast.training.step import TrainingStep

LEARNING_RATE = 3e-4
BATCHES = 4  # of tokens, in turn
LOSSES = 3  # first losses that a row keeps
LEAST_SECONDS = 15.0  # a rung is not begun with less
AGREE = 0.05  # nats: bf16 rounding moves an untrained model's loss by less than a hundredth


def turn(lock: Path | None) -> contextlib.AbstractContextManager:
    """While this lasts, no other process is in its own turn; with the process it ends, however that ends."""
    return FileLock(lock) if lock else contextlib.nullcontext()


def measure(rung: Rung, size: str, B: int, T: int, device: torch.device, options: argparse.Namespace) -> dict:
    """Train on this rung and time each step. {"status": "skipped", "why"} if it makes no sense on this device."""
    if why := refusal(rung, device):
        return {"status": "skipped", "why": why}
    try:
        take_step = training_step(rung, size, T, device)
    except UserError as error:
        return {"status": "skipped", "why": str(error)}
    start = time.perf_counter()
    if options.lock and rung.compile:
        compile_beforehand(take_step, B, T, device)
    compiled = time.perf_counter() - start
    with turn(options.lock):
        return {"compile_s": round(compiled, 2)} | timed(take_step, rung, B, T, device, options)


def compile_beforehand(take_step: TrainingStep, B: int, T: int, device: torch.device) -> None:
    """Forward and backward, while others have their turn. What is compiled stays so if a neighbour has the memory."""
    with contextlib.suppress(torch.OutOfMemoryError):
        take_step.rehearse(next(endless_batches(take_step.model.config.vocab_size, B, T, device)))
    take_step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(
    take_step: TrainingStep, rung: Rung, B: int, T: int, device: torch.device, options: argparse.Namespace
) -> dict:
    """Warm up, then time each step."""
    config = take_step.model.config
    batches = endless_batches(config.vocab_size, B, T, device)
    losses: list[torch.Tensor] = []

    def step() -> None:
        done = take_step(batches, LEARNING_RATE)
        if done and len(losses) < LOSSES:
            losses.append(done[0])

    start = time.perf_counter()
    for _ in range(max(options.warmup, LOSSES)):
        step()
    first = [loss.item() for loss in losses]
    warm = time.perf_counter() - start
    times = harness.time_calls(step, device, options.steps, options.seconds)
    speed = harness.spread([B * T / t for t in times])
    peak = flops.peak_flops(device_name(device), rung.precision, rung.tf32)
    return {
        "status": "ok",
        "tokens_per_s": speed,
        "ms": harness.spread([1e3 * t for t in times]),
        "steps": len(times),
        "warmup_s": round(warm, 2),
        "peak_memory": harness.peak_memory(device),
        "mfu": flops.mfu(speed["median"], config, T, peak),
        "flops_per_token": flops.flops_per_token(config, T),
        "losses": first,
    }


def endless_batches(vocab_size: int, B: int, T: int, device: torch.device):
    """The same few batches of random ids for ever, on the device beforehand: data loading is not what is timed."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (BATCHES, B, T + 1), generator=generator).to(device)
    while True:
        for rows in tokens:
            yield rows[:, :-1], rows[:, 1:]


def climb(options: argparse.Namespace, device: torch.device, path: Path) -> list[dict]:
    """Run each rung in its own process; the rows, which are in `path` as soon as they exist, in the rungs' order."""
    record = versions.record()
    settings = {"size": options.size, "B": options.batch_size, "T": options.seq_len, "data": "seeded random ids"}
    rows: list[dict] = []
    end = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda name: apart(name, options, device, end, Path(folder)), options.rungs)
        for name, result in zip(options.rungs, results):
            row = {"suite": "ladder", "rung": name, **result, "config": settings | asdict(RUNGS[name])}
            row |= {"machine": record, "agrees": agrees(row, rows)}
            harness.append_row(path, row)
            rows.append(row)
            print(f"{name}: {describe(row)}", flush=True)
    return rows


def apart(name: str, options: argparse.Namespace, device: torch.device, end: float, folder: Path) -> dict:
    """A rung in a process of its own, while there is time."""
    limit = min(options.limit, end - time.monotonic())
    if limit < LEAST_SECONDS:
        return {"status": "skipped", "why": f"{options.budget:.0f} s for all rungs are over"}
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    arguments = ["--size", options.size, "--batch-size", options.batch_size, "--seq-len", options.seq_len]
    arguments += ["--steps", options.steps, "--warmup", options.warmup, "--seconds", options.seconds]
    arguments += ["--device", device, "--only", name, out]
    arguments += ["--lock", folder / "lock"] if options.jobs > 1 else []
    result = harness.run_apart("benchmarks.ladder", *arguments, limit=limit, log=log)
    return json.loads(out.read_text()) | {"seconds": result["seconds"]} if out.exists() else result


def agrees(row: dict, before: Sequence[dict]) -> bool | None:
    """Whether the first losses are those of the first rung that ran; None if there is nothing to compare."""
    first = next((other for other in before if "losses" in other), None)
    if first is None or "losses" not in row:
        return None
    return all(abs(a - b) < AGREE for a, b in zip(row["losses"], first["losses"]))


def describe(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row.get('why') or row['tail'].strip().splitlines()[-1]}"
    return f"{row['tokens_per_s']['median']:,.0f} tokens/s"


def table(rows: Sequence[dict]) -> str:
    """For people: speed-ups are over the first rung that ran."""
    lines = [f"{'rung':<21}{'tokens/s':>11}{'p20':>11}{'p80':>11}{'ms':>9}{'x':>7}{'peak GB':>9}  MFU"]
    base = next((row["tokens_per_s"]["median"] for row in rows if row["status"] == "ok"), None)
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['rung']:<21}{describe(row)}")
            continue
        speed = row["tokens_per_s"]
        lines.append(
            f"{row['rung']:<21}{speed['median']:>11,.0f}{speed['p20']:>11,.0f}{speed['p80']:>11,.0f}"
            f"{row['ms']['median']:>9,.1f}{speed['median'] / base:>7.2f}{row['peak_memory'] / 1e9:>9.2f}  "
            f"{share(row['mfu'])}" + ("" if row["agrees"] is not False else "  losses differ from the first rung's")
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=SIZES, help="gpt2 on CUDA, else nano")
    p.add_argument("--batch-size", type=int, help="sequences, B: 64 on CUDA, else 8")
    p.add_argument("--seq-len", type=int, help="tokens in a sequence, T: the model's block size")
    p.add_argument("--steps", type=int, default=20, help="timed steps at most")
    p.add_argument("--warmup", type=int, default=5, help="steps before, at least 3")
    p.add_argument("--seconds", type=float, default=10.0, help="timed seconds at most, but 3 steps")
    p.add_argument("--limit", type=float, default=300.0, help="seconds for a rung, start and compiling included")
    p.add_argument("--budget", type=float, default=float("inf"), help="seconds for all rungs")
    p.add_argument("--device", default="auto")
    p.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(CLIMB))
    p.add_argument("--jobs", type=int, default=1, help="rungs that may compile at a time; they are timed one by one")
    p.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    p.add_argument("--file", type=Path, help="append the rows to this file instead")
    p.add_argument("--only", nargs=2, metavar=("RUNG", "FILE"), help=argparse.SUPPRESS)  # what a rung's process gets
    p.add_argument("--lock", type=Path, help=argparse.SUPPRESS)  # and with --jobs
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    device = pick_device(options.device)
    options.size = options.size or ("gpt2" if device.type == "cuda" else "nano")
    options.batch_size = options.batch_size or (64 if device.type == "cuda" else 8)
    options.seq_len = options.seq_len or SIZES[options.size].block_size
    for name in ("batch_size", "seq_len", "steps", "warmup", "seconds", "limit", "budget", "jobs"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be more than 0")
    if options.only:
        name, out = options.only
        shape = options.size, options.batch_size, options.seq_len, device
        row = measure(RUNGS[name], *shape, options)
        Path(out).write_text(json.dumps(row))
        return 0
    path = options.file or harness.results_file("ladder", options.out)
    print(f"{options.size}, B {options.batch_size}, T {options.seq_len}, on {device_name(device)}; rows in {path}")
    rows = climb(options, device, path)
    print(table(rows))
    return 0 if all(row["status"] in ("ok", "skipped") for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
