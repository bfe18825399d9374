"""Time a training step, one rung at a time: `python -m benchmarks.ladder`.

The rungs are those of benchmarks/rungs.py: from fp32 to our kernels, each adds one thing to the one before. `--rungs
fused layer_norm ...` swaps single ops instead; `--rungs triton +residual ... all all_but_residual ... graph` adds and
removes options of ours. All do the same work, with the same initial weights and the same tokens (seeded random ids,
since speed does not depend on the text), so their first losses must agree. Each rung runs in its own process, so that
its peak memory is its own and a crash costs one row. A rung that cannot run here is a row that says why. With `--jobs`
several rungs compile at a time, which is most of a rung's minute on a GPU; they are still timed one after the other,
and the few steps with which another rung's compilation ends do not move the median of forty steps.

A table of sizes is a loop over `--size`.
"""

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock

from benchmarks import flags, harness
from benchmarks.rungs import CLIMB, RUNGS, refusal, training_step
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least, one_line
from gpt2fast.machine import versions
from gpt2fast.machine.device import Precision, device_name, pick_device
from gpt2fast.model import SIZES, GPTConfig
from gpt2fast.training import flops
from gpt2fast.training.screen import percent
from gpt2fast.training.step import TrainingStep

LEARNING_RATE = 3e-4
BATCHES = 4  # of tokens, in turn
LOSSES = 3  # first losses that a row keeps
AGREE = 0.05  # nats: bf16 rounding moves an untrained model's loss by less than a hundredth


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Time a training step, one rung at a time."""

    size: flags.Size | None = None
    """Model. None: gpt2 on CUDA, else nano."""
    batch_size: int | None = None
    """Sequences in a batch, B. None: 64 on CUDA, else 8."""
    seq_len: int | None = None
    """Tokens in a sequence, T. None: the model's block size."""
    steps: int = 20
    """Time at most this many steps."""
    warmup: int = 5
    """Steps before them, at least 3."""
    seconds: float = 10.0
    """Time steps for at most this long, but at least 3 of them."""
    limit: float = 300.0
    """Seconds for a rung, with starting and compiling."""
    budget: float = math.inf
    """Seconds for all rungs."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    rungs: tuple[str, ...] = tuple(CLIMB)
    """Rungs, by their names in benchmarks/rungs.py."""
    jobs: int = 1
    """Rungs that may compile at a time; they are timed one by one."""
    out: Path = harness.RESULTS
    """Folder of results."""
    file: Path | None = None
    """Append the rows to this file instead of a new one in --out."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the process of a rung gets."""

    rung: str
    size: str
    B: int
    T: int
    device: str
    steps: int
    warmup: int
    seconds: float
    lock: str | None = None


def turn(lock: str | None) -> contextlib.AbstractContextManager:
    """Return a lock that one process holds at a time. It is released when its process ends, however it ends."""
    return FileLock(lock) if lock else contextlib.nullcontext()


def measure(job: Job) -> dict:
    """Train on a rung and time each step. Return {"status": "skipped", "why"} if it cannot run on this device."""
    rung, device = RUNGS[job.rung], torch.device(job.device)
    if why := refusal(rung, device):
        return {"status": "skipped", "why": why}
    try:
        take_step = training_step(rung, job.size, job.T, device)
    except UserError as error:
        return {"status": "skipped", "why": str(error)}
    start = time.perf_counter()
    if job.lock and rung.compile:
        compile_beforehand(take_step, job.B, job.T, device)
    compiled = {"compile_s": round(time.perf_counter() - start, 2)}
    config = take_step.model.config
    with turn(job.lock):
        row = timed(
            take_step, config, job.B, job.T, device,
            precision=rung.precision, tf32=rung.tf32, steps=job.steps, warmup=job.warmup, seconds=job.seconds,
        )  # fmt: skip
    return compiled | row | {"flops_per_token": flops.flops_per_token(config, job.T)}


def compile_beforehand(take_step: TrainingStep, B: int, T: int, device: torch.device) -> None:
    """Run forward and backward once, outside of the rung's turn.

    If another process has the memory that this needs, what was compiled until then is kept all the same.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        take_step.rehearse(next(endless_batches(take_step.model.config.vocab_size, B, T, device)))
    take_step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(
    take_step: Callable,
    config: GPTConfig,
    B: int,
    T: int,
    device: torch.device,
    *,
    precision: Precision,
    tf32: bool,
    steps: int,
    warmup: int,
    seconds: float,
) -> dict:
    """Warm up, then time each call of take_step(batches, lr) -> (loss, ...), or None while it only records."""
    batches = endless_batches(config.vocab_size, B, T, device)
    losses: list[torch.Tensor] = []

    def step() -> None:
        done = take_step(batches, LEARNING_RATE)
        if done and len(losses) < LOSSES:
            losses.append(done[0])

    start = time.perf_counter()
    for _ in range(max(warmup, LOSSES)):
        step()
    first = [loss.item() for loss in losses]
    warm = time.perf_counter() - start
    times = harness.time_calls(step, device, steps, seconds)
    speed = harness.spread([B * T / t for t in times])
    peak = flops.peak_flops(device_name(device), precision, tf32)
    return {
        "status": "ok",
        "tokens_per_s": speed,
        "ms": harness.spread([1e3 * t for t in times]),
        "steps": len(times),
        "warmup_s": round(warm, 2),
        "peak_memory": harness.peak_memory(device),
        "mfu": flops.mfu(speed["median"], config, T, peak),
        "losses": first,
    }


def endless_batches(vocab_size: int, B: int, T: int, device: torch.device) -> Iterator[tuple]:
    """Yield the same few batches of random ids forever. They are on the device already: loading is not timed."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (BATCHES, B, T + 1), generator=generator).to(device)
    while True:
        for rows in tokens:
            yield rows[:, :-1], rows[:, 1:]


def climb(c: LadderConfig) -> list[dict]:
    """Run each rung in its own process and print a table. The rows, in the rungs' order, are on the disk at once."""
    check_at_least(c, batch_size=1, seq_len=1, steps=1, warmup=1, jobs=1, seconds=0, limit=0, budget=0)
    if unknown := [name for name in c.rungs if name not in RUNGS]:
        raise UserError(f"--rungs {unknown[0]}: there are {', '.join(RUNGS)}")
    device = pick_device(c.device)
    cuda = device.type == "cuda"
    size = c.size or ("gpt2" if cuda else "nano")
    B, T = c.batch_size or (64 if cuda else 8), c.seq_len or SIZES[size].block_size
    path = c.file or harness.results_file("ladder", c.out)
    print(f"{size}, B {B}, T {T}, on {device_name(device)}; rows in {path}")
    record, end = versions.record(), time.monotonic() + c.budget
    rows: list[dict] = []
    settings = {"size": size, "B": B, "T": T, "data": "seeded random ids"}
    with tempfile.TemporaryDirectory() as folder:
        lock = str(Path(folder) / "lock") if c.jobs > 1 else None
        jobs = [
            Job(rung=name, size=size, B=B, T=T, device=str(device), steps=c.steps, warmup=c.warmup, seconds=c.seconds,
                lock=lock) for name in c.rungs
        ]  # fmt: skip
        results = harness.each_apart(measure, jobs, limit=c.limit, end=end, at_once=c.jobs)
        for name, result in zip(c.rungs, results):
            row = {"suite": "ladder", "rung": name, **result, "config": settings | asdict(RUNGS[name])}
            row |= {"machine": record, "agrees": agrees(row, rows)}
            harness.append_row(path, row)
            rows.append(row)
            print(f"{name}: {describe(row)}", flush=True)
    print(table(rows))
    return rows


def agrees(row: dict, before: Sequence[dict]) -> bool | None:
    """Return whether the first losses are those of the first rung that ran; None if there is nothing to compare."""
    first = next((other for other in before if "losses" in other), None)
    if first is None or "losses" not in row:
        return None
    return all(abs(a - b) < AGREE for a, b in zip(row["losses"], first["losses"]))


def describe(row: dict) -> str:
    """Return a row's speed, or why it has none."""
    if row["status"] != "ok":
        return f"{row['status']}: {why(row)}"
    return f"{row['tokens_per_s']['median']:,.0f} tokens/s"


def why(row: dict) -> str:
    """Return why a row has no numbers: its reason, or the last line of its output."""
    return one_line(row.get("why") or (row.get("tail", "").strip().splitlines() or ["no output"])[-1])


def table(rows: Sequence[dict]) -> str:
    """Return the rows as a table; speed-ups are over the first rung that ran."""
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
            f"{percent(row['mfu'])}" + ("" if row["agrees"] is not False else "  losses differ from the first rung's")
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    return harness.exit_code(climb(flags.parse(LadderConfig, argv, "benchmarks.ladder")))


if __name__ == "__main__":
    run_main(main)
