"""Our training step beside the ones that people use, in one run: `python -m benchmarks.peers`.

    textbook       plain PyTorch as in nanoGPT (benchmarks/textbook.py): unfused AdamW, eager and compiled
    transformers   GPT2LMHeadModel with SDPA and fused AdamW, eager and compiled
    liger          the same with Liger's Triton kernels; on a GPU
    torch, triton  our two backends, eager and compiled, torch also with max-autotune; the residual stream and AdamW
                   are what training takes with them
    auto           what `--backend auto` takes, compiled

All do the same work: the same initial weights, tokens, AdamW and clipping; the losses of the first steps must agree.
Each runs in a process of its own, since memory, allocator settings and compilers' caches are a process's; all take
turns, `--repetitions` times, so that a machine that slows down does so for all. A row for each process; what cannot
run here is a row that says why. On a CPU opponents also run with our allocator settings, which nobody has by default.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import harness, textbook
from benchmarks.ladder import LEARNING_RATE, LOSSES, agrees, describe, endless_batches
from gpt2fast import auto, ops
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.machine import versions
from gpt2fast.machine.device import (
    Precision,
    autocast,
    device_name,
    keep_freed_memory,
    pick_device,
    pick_precision,
    set_tf32,
    use_allowed_cores,
)
from gpt2fast.measure import Workload
from gpt2fast.model import GPT, SIZES, GPTConfig
from gpt2fast.ops import OpsConfig
from gpt2fast.training import choices, flops, optim
from gpt2fast.training.choices import Place
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.screen import share
from gpt2fast.training.step import TrainingStep

MAX_AUTOTUNE = "max-autotune-no-cudagraphs"  # CUDA graphs would need static inputs
LEAST_SECONDS = 20.0  # a process is not begun with less


@dataclass(frozen=True)
class Peer:
    peer: str  # whose step
    mode: str = "eager"  # or compiled, max-autotune
    allocator: bool = False  # with our settings, though not ours

    @property
    def ours(self) -> bool:
        return self.peer not in textbook.PEERS

    @property
    def name(self) -> str:
        return f"{self.peer} {self.mode}".replace("auto compiled", "auto") + ", our allocator" * self.allocator


OPPONENTS = [Peer(peer, mode) for peer in textbook.PEERS for mode in ("eager", "compiled")]
ALLOCATED = [replace(peer, allocator=True) for peer in OPPONENTS if peer.peer != "liger"]
OURS = [Peer(backend, mode) for backend in ("torch", "triton") for mode in ("eager", "compiled")]
OURS += [Peer("torch", "max-autotune"), Peer("auto", "compiled")]
ALL = {peer.name: peer for peer in (*OPPONENTS, *ALLOCATED, *OURS)}


@dataclass(frozen=True)
class Work:
    """What is trained."""

    size: str
    B: int
    T: int
    precision: Precision
    device: str


def their_step(peer: Peer, ours: GPT, work: Work, device: torch.device) -> Callable:
    """A step(batches, lr) -> (loss, norm) as their users write it."""
    model = textbook.PEERS[peer.peer](ours).to(device)
    forward = model if peer.mode == "eager" else torch.compile(model, dynamic=False)
    optimizer = optim.adamw(model, 0.1, fused=peer.peer != "textbook")
    parameters = list(model.parameters())

    def step(batches, lr):
        with autocast(device, work.precision):
            loss = forward(*next(batches))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return step


def our_step(peer: Peer, model: GPT, choice: OpsConfig, work: Work, device: torch.device) -> Callable:
    compile, mode = peer.mode != "eager", MAX_AUTOTUNE if peer.mode == "max-autotune" else None
    ours = choices.adamw_is_ours(TrainConfig(), choice, Place(device, work.precision, None))
    optimizer = optim.adamw(model, 0.1, kernels=ops.kernels(device.type) if ours else None)
    return TrainingStep(model, optimizer, precision=work.precision, compile=compile, mode=mode)


def refusal(peer: Peer, device: torch.device) -> str | None:
    """Why this peer has nothing to show on this device."""
    if peer.peer == "liger" and device.type != "cuda":
        return "Liger's kernels need a GPU"
    if peer.allocator and device.type != "cpu":
        return f"what is computed on {device.type} does not use the C library's allocator"
    if peer.peer == "triton" and ops.interpreted(OpsConfig().with_backend("triton")):
        return "the speed of Triton's interpreter says nothing: unset TRITON_INTERPRET"
    return None


def chosen(config: GPTConfig, work: Work, device: torch.device) -> tuple[OpsConfig, dict]:
    """What `--backend auto` takes in a compiled step; the same as plain strings, for the row."""
    load = Workload(
        B=work.B, T=work.T, C=config.n_embd, H=config.n_head, V=config.padded_vocab_size, vocab_size=config.vocab_size,
        precision=work.precision, tf32=True, compiled=True,
        residual=choices.residual_dtype(TrainConfig(), Place(device, work.precision, None)),
    )  # fmt: skip
    choice = auto.pick(OpsConfig(), load, device).ops
    return choice, asdict(choice)


def measure(peer: Peer, work: Work, device: torch.device, warmup: int, steps: int, seconds: float) -> dict:
    """Train as this peer does and time each step."""
    if why := refusal(peer, device):
        return {"status": "skipped", "why": why}
    use_allowed_cores()  # for all: a number of threads is nobody's merit
    if device.type == "cpu" and (peer.ours or peer.allocator):
        keep_freed_memory()
    config = replace(SIZES[work.size], block_size=max(work.T, SIZES[work.size].block_size))
    set_tf32(device, True)
    choice = OpsConfig().with_backend("triton" if peer.peer == "triton" else "torch")
    row = {}
    try:
        if peer.peer == "auto":
            choice, row["ops"] = chosen(config, work, device)
        stream = choices.residual_dtype(TrainConfig(), Place(device, work.precision, None))
        model = GPT(config, ops.build(choice, device.type), residual="fp32" if stream == "fp32" else "low").to(device)
        step = our_step(peer, model, choice, work, device) if peer.ours else their_step(peer, model, work, device)
    except (UserError, ImportError) as error:
        return {"status": "skipped", "why": str(error)}
    if not peer.ours:
        del model
    batches = endless_batches(config.vocab_size, work.B, work.T, device)
    start = time.perf_counter()
    first = [step(batches, LEARNING_RATE)[0].item() for _ in range(LOSSES)]
    for _ in range(warmup - LOSSES):
        step(batches, LEARNING_RATE)
    warm = time.perf_counter() - start
    times = harness.time_calls(lambda: step(batches, LEARNING_RATE), device, steps, seconds)
    speed = harness.spread([work.B * work.T / t for t in times])
    peak = flops.peak_flops(device_name(device), work.precision, tf32=True)
    return row | {
        "status": "ok",
        "tokens_per_s": speed,
        "ms": harness.spread([1e3 * t for t in times]),
        "steps": len(times),
        "warmup_s": round(warm, 2),
        "peak_memory": harness.peak_memory(device),
        "mfu": flops.mfu(speed["median"], config, work.T, peak),
        "losses": first,
    }


def run_all(names: Sequence[str], work: Work, options: argparse.Namespace, path: Path) -> list[dict]:
    """Each peer in its own process, all of them in turn, again and again."""
    record = versions.record()
    rows: list[dict] = []
    end = time.monotonic() + options.budget
    hopeless: set[str] = set()  # what was skipped once will be again
    for repetition in range(options.repetitions):
        for name in names:
            if name in hopeless:
                continue
            limit = min(options.limit, end - time.monotonic())
            print(f"{repetition + 1}/{options.repetitions}  {name} ...", end=" ", flush=True)
            result = apart(name, work, options, limit)
            peer = {**asdict(ALL[name]), "name": name, "ours": ALL[name].ours, "repetition": repetition}
            config = asdict(work) | {"data": "seeded random ids"}
            row = {"suite": "peers", **peer, **result, "config": config, "machine": record}
            row["agrees"] = agrees(row, rows)
            harness.append_row(path, row)
            rows.append(row)
            if row["status"] == "skipped":
                hopeless.add(name)
            print(describe(row), flush=True)
    return rows


def apart(name: str, work: Work, options: argparse.Namespace, limit: float) -> dict:
    if limit < LEAST_SECONDS:
        return {"status": "skipped", "why": f"{options.budget:.0f} s for all are over"}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log"
        arguments = ["--size", work.size, "--batch-size", work.B, "--seq-len", work.T, "--precision", work.precision]
        arguments += ["--device", work.device, "--steps", options.steps, "--warmup", options.warmup]
        arguments += ["--seconds", options.seconds, "--only", name, out]
        result = harness.run_apart("benchmarks.peers", *arguments, limit=limit, log=log)
        return json.loads(out.read_text()) | {"seconds": result["seconds"]} if out.exists() else result


def table(rows: Sequence[dict]) -> str:
    """For people: medians over the repetitions; ratios are to the best opponent that ran."""
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    speeds = {
        name: [row["tokens_per_s"]["median"] for row in of if row["status"] == "ok"] for name, of in by_name.items()
    }
    best = max((median(v) for name, v in speeds.items() if v and not ALL[name].ours), default=None)
    lines = [f"{'step':<36}{'tokens/s':>9}{'lowest':>9}{'highest':>9}{'ms':>9}{'peak GB':>9}{'x best':>8}  MFU"]
    for name, of in by_name.items():
        good = [row for row in of if row["status"] == "ok"]
        if not good:
            lines.append(f"{name:<36}{describe(of[0])}")
            continue
        ratio = f"{median(speeds[name]) / best:.2f}" if best else "-"
        lines.append(
            f"{name:<36}{median(speeds[name]):>9,.0f}{min(speeds[name]):>9,.0f}{max(speeds[name]):>9,.0f}"
            f"{median(row['ms']['median'] for row in good):>9,.1f}"
            f"{max(row['peak_memory'] for row in good) / 1e9:>9.2f}{ratio:>8}  {share(good[0]['mfu'])}"
            + ("" if all(row["agrees"] is not False for row in good) else "  losses differ from the first row's")
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=SIZES, default="gpt2")
    p.add_argument("--batch-size", type=int, help="sequences, B: 64 on CUDA, 8 for nano, else 4")
    p.add_argument("--seq-len", type=int, help="tokens in a sequence, T: 1024 on CUDA, 128 for nano, else 256")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--peers", nargs="+", choices=ALL, metavar="NAME", help=f"of {', '.join(ALL)}")
    p.add_argument("--repetitions", type=int, default=3, help="turns of all peers")
    p.add_argument("--steps", type=int, default=20, help="timed steps of a turn, at most")
    p.add_argument("--warmup", type=int, default=5, help="steps before, at least 3")
    p.add_argument("--seconds", type=float, default=10.0, help="timed seconds of a turn, at most, but 3 steps")
    p.add_argument("--limit", type=float, default=300.0, help="seconds for a process, start and compiling included")
    p.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    p.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    p.add_argument("--file", type=Path, help="append the rows to this file instead")
    p.add_argument("--only", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)  # what a process gets
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    cuda, nano = device.type == "cuda", options.size == "nano"
    B = options.batch_size or (64 if cuda else 8 if nano else 4)
    T = options.seq_len or min(SIZES[options.size].block_size, 1024 if cuda else 256)
    work = Work(options.size, B, T, precision, str(device))
    for name in ("repetitions", "steps", "warmup", "seconds", "limit", "budget"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name} is {getattr(options, name)}: it must be more than 0")
    if B < 1 or T < 1:
        raise UserError(f"--batch-size {B} and --seq-len {T} must be at least 1")
    if options.only:
        name, out = options.only
        row = measure(ALL[name], work, device, options.warmup, options.steps, options.seconds)
        Path(out).write_text(json.dumps(row))
        return 0
    names = options.peers or [name for name, peer in ALL.items() if cuda or refusal(peer, device) is None]
    path = options.file or harness.results_file("peers", options.out)
    print(f"{work.size}, B {B}, T {T}, {precision}, on {device_name(device)}; rows in {path}")
    rows = run_all(names, work, options, path)
    print(table(rows))
    return 0 if all(row["status"] in ("ok", "skipped") for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
