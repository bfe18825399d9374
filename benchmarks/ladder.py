"""Training tokens/s, one rung at a time: `python -m benchmarks.ladder`.

Each rung is the one before plus one thing: fp32, allocator settings (a CPU only), TF32 (CUDA only), bf16 autocast,
torch.compile, fused AdamW, then our kernels. `--rungs fused layer_norm ...` swaps single ops instead.
All do the same work: the same initial weights and the same tokens (seeded random ids, since speed does not depend on
the text), so their first losses must agree. Each runs in its own process, so that its peak memory is its own and a
crash costs one row. A rung that cannot run here is a row that says why.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import harness
from gpt2fast import flops, machine, optim
from gpt2fast.allocator import keep_freed_memory
from gpt2fast.device import Precision, device_name, pick_device, set_tf32
from gpt2fast.errors import UserError, run_main
from gpt2fast.model import GPT, SIZES
from gpt2fast.ops import NAMES, Implementation, OpsConfig, build, interpreted
from gpt2fast.screen import share
from gpt2fast.step import TrainingStep

LEARNING_RATE = 3e-4
BATCHES = 4  # of tokens, in turn
LOSSES = 3  # first losses that a row keeps
LEAST_SECONDS = 15.0  # a rung is not begun with less
AGREE = 0.05  # nats: bf16 rounding moves an untrained model's loss by less than a hundredth


@dataclass(frozen=True)
class Rung:
    name: str
    allocator: bool = False
    precision: Precision = "fp32"
    tf32: bool = False
    compile: bool = False
    fused: bool = False
    backend: Implementation = "torch"
    swapped: str = ""  # the one op that is triton's, whatever the backend

    @property
    def ops(self) -> OpsConfig:
        return OpsConfig(**({self.swapped: "triton"} if self.swapped else {})).with_backend(self.backend)


FP32 = Rung("fp32")
ALLOCATOR = replace(FP32, name="allocator", allocator=True)
TF32 = replace(ALLOCATOR, name="tf32", tf32=True)
BF16 = replace(TF32, name="bf16", precision="bf16")
COMPILE = replace(BF16, name="compile", compile=True)
FUSED = replace(COMPILE, name="fused", fused=True)
TRITON = replace(FUSED, name="triton", backend="triton")
CLIMB = {rung.name: rung for rung in (FP32, ALLOCATOR, TF32, BF16, COMPILE, FUSED, TRITON)}
SWAPS = {name: replace(FUSED, name=name, swapped=name) for name in NAMES}  # "fused" with one op of ours each
RUNGS = CLIMB | SWAPS


def measure(
    rung: Rung, size: str, B: int, T: int, device: torch.device, warmup: int, steps: int, seconds: float
) -> dict:
    """Train on this rung and time each step. {"status": "skipped", "why"} if it makes no sense on this device."""
    if rung.name == "tf32" and device.type != "cuda":
        return {"status": "skipped", "why": f"{device.type} has no TF32"}
    if rung.name == "allocator" and device.type != "cpu":
        return {"status": "skipped", "why": f"what is computed on {device.type} does not use the C library's allocator"}
    if interpreted(rung.ops):
        return {"status": "skipped", "why": "the speed of Triton's interpreter says nothing: unset TRITON_INTERPRET"}
    try:
        ops = build(rung.ops, device.type)
    except UserError as error:
        return {"status": "skipped", "why": str(error)}
    if rung.allocator and device.type == "cpu":
        keep_freed_memory()
    config = replace(SIZES[size], block_size=max(T, SIZES[size].block_size))
    set_tf32(device, rung.tf32)
    model = GPT(config, ops).to(device)
    optimizer = optim.adamw(model, 0.1, fused=rung.fused)
    take_step = TrainingStep(model, optimizer, precision=rung.precision, compile=rung.compile)
    batches = endless_batches(config.vocab_size, B, T, device)
    losses: list[torch.Tensor] = []

    def step() -> None:
        loss, _ = take_step(batches, LEARNING_RATE)
        if len(losses) < LOSSES:
            losses.append(loss)

    start = time.perf_counter()
    for _ in range(max(warmup, LOSSES)):
        step()
    first = [loss.item() for loss in losses]
    warm = time.perf_counter() - start
    times = harness.time_calls(step, device, steps, seconds)
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
    """Run each rung in its own process; the rows, which are in `path` as soon as they exist."""
    record = machine.record()
    settings = {"size": options.size, "B": options.batch_size, "T": options.seq_len, "data": "seeded random ids"}
    rows = []
    end = time.monotonic() + options.budget
    for name in options.rungs:
        limit = min(options.limit, end - time.monotonic())
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "row.json", Path(folder) / "log"
            arguments = ["--size", options.size, "--batch-size", options.batch_size, "--seq-len", options.seq_len]
            arguments += ["--steps", options.steps, "--warmup", options.warmup, "--seconds", options.seconds]
            print(f"{name} ...", end=" ", flush=True)
            arguments += ["--device", device, "--only", name, out]
            if limit < LEAST_SECONDS:
                result = {"status": "skipped", "why": f"{options.budget:.0f} s for all rungs are over"}
            else:
                result = harness.run_apart("benchmarks.ladder", *arguments, limit=limit, log=log)
            if out.exists():
                result = json.loads(out.read_text()) | {"seconds": result["seconds"]}
        row = {"suite": "ladder", "rung": name, **result, "config": settings | asdict(RUNGS[name]), "machine": record}
        row["agrees"] = agrees(row, rows)
        harness.append_row(path, row)
        rows.append(row)
        print(describe(row), flush=True)
    return rows


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
    p.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    p.add_argument("--file", type=Path, help="append the rows to this file instead")
    p.add_argument("--only", nargs=2, metavar=("RUNG", "FILE"), help=argparse.SUPPRESS)  # what a rung's process gets
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    device = pick_device(options.device)
    options.size = options.size or ("gpt2" if device.type == "cuda" else "nano")
    options.batch_size = options.batch_size or (64 if device.type == "cuda" else 8)
    options.seq_len = options.seq_len or SIZES[options.size].block_size
    for name in ("batch_size", "seq_len", "steps", "warmup", "seconds", "limit", "budget"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be more than 0")
    if options.only:
        name, out = options.only
        shape = options.size, options.batch_size, options.seq_len, device
        row = measure(RUNGS[name], *shape, options.warmup, options.steps, options.seconds)
        Path(out).write_text(json.dumps(row))
        return 0
    path = options.file or harness.results_file("ladder", options.out)
    print(f"{options.size}, B {options.batch_size}, T {options.seq_len}, on {device_name(device)}; rows in {path}")
    rows = climb(options, device, path)
    print(table(rows))
    return 0 if all(row["status"] in ("ok", "skipped") for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
