"""Time our training step beside the ones that people use: `python -m benchmarks.peers`.

    textbook       plain PyTorch as in nanoGPT (benchmarks/textbook.py): unfused AdamW, eager and compiled
    transformers   GPT2LMHeadModel with SDPA and fused AdamW, eager and compiled
    liger          the same with Liger's Triton kernels; on a GPU
    torch, triton  our two backends, eager and compiled, torch also with max-autotune; the residual stream and AdamW
                   are those that training uses with them
    auto           what `--backend auto` chooses, compiled

All do the same work: the same initial weights, tokens, AdamW and clipping; the losses of the first steps must agree.
Each runs in a process of its own, since memory, allocator settings and compilers' caches belong to a process; all take
turns, `--repetitions` times, so that a machine that slows down affects all of them. Each process gives a row; a peer
that cannot run here is a row that says why. On a CPU opponents also run with our allocator settings, which no one has
by default.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import flags, harness, textbook
from benchmarks.ladder import agrees, describe, timed
from gpt2fast import auto, ops
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least
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
from gpt2fast.training import choices, optim
from gpt2fast.training.choices import Place
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.screen import percent
from gpt2fast.training.step import TrainingStep

MAX_AUTOTUNE = "max-autotune-no-cudagraphs"  # CUDA graphs would need static inputs


@dataclass(frozen=True)
class Peer:
    peer: str  # whose step
    mode: str = "eager"  # or compiled, max-autotune
    allocator: bool = False  # an opponent with our allocator settings

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


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """Time our training step beside the ones that people use."""

    size: flags.Size = "gpt2"
    """Model."""
    batch_size: int | None = None
    """Sequences in a batch, B. None: 64 on CUDA, 8 for nano, else 4."""
    seq_len: int | None = None
    """Tokens in a sequence, T. None: 1024 on CUDA, 128 for nano, else 256."""
    precision: flags.AnyPrecision = "auto"
    """auto: bf16 where the device is fast at it, fp16 on CUDA without it, else fp32."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    peers: tuple[str, ...] = ()
    """Peers, by name: 'torch compiled', for one. None named: all that can run here."""
    repetitions: int = 3
    """Turns of all peers."""
    steps: int = 20
    """Time at most this many steps in a turn."""
    warmup: int = 5
    """Steps before them, at least 3."""
    seconds: float = 10.0
    """Time steps for at most this long in a turn, but at least 3 of them."""
    limit: float = 300.0
    """Seconds for a process, with starting and compiling."""
    budget: float = math.inf
    """Seconds for everything."""
    out: Path = harness.RESULTS
    """Folder of results."""
    file: Path | None = None
    """Append the rows to this file instead of a new one in --out."""


@dataclass(frozen=True)
class Work:
    """The training that all peers do."""

    size: str
    B: int
    T: int
    precision: Precision
    device: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the process of a peer gets."""

    name: str
    work: Work
    steps: int
    warmup: int
    seconds: float


def their_step(peer: Peer, ours: GPT, work: Work, device: torch.device) -> Callable:
    """Return a step(batches, lr) -> (loss, norm), written as its users write it."""
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
    """Return the step of gpt2fast.train with these ops."""
    compile, mode = peer.mode != "eager", MAX_AUTOTUNE if peer.mode == "max-autotune" else None
    ours = choices.adamw_is_ours(TrainConfig(), choice, Place(device, work.precision, None))
    optimizer = optim.adamw(model, 0.1, kernels=ops.kernels(device.type) if ours else None)
    return TrainingStep(model, optimizer, precision=work.precision, compile=compile, mode=mode)


def refusal(peer: Peer, device: torch.device) -> str | None:
    """Return why this peer cannot be measured on this device, or None."""
    if peer.peer == "liger" and device.type != "cuda":
        return "Liger's kernels need a GPU"
    if peer.allocator and device.type != "cpu":
        return f"computation on {device.type} does not use the C library's allocator"
    if peer.peer == "triton" and ops.interpreted(OpsConfig().with_backend("triton")):
        return "times of Triton's interpreter mean nothing: unset TRITON_INTERPRET"
    return None


def chosen(config: GPTConfig, work: Work, device: torch.device) -> tuple[OpsConfig, dict]:
    """Return the ops that `--backend auto` chooses for a compiled step, and the same as plain strings for the row."""
    load = Workload(
        B=work.B, T=work.T, C=config.n_embd, H=config.n_head, V=config.padded_vocab_size, vocab_size=config.vocab_size,
        precision=work.precision, tf32=True, compiled=True,
        residual=choices.residual_dtype(TrainConfig(), Place(device, work.precision, None)),
    )  # fmt: skip
    choice = auto.pick(OpsConfig(), load, device).ops
    return choice, asdict(choice)


def measure(job: Job) -> dict:
    """Train as a peer does and time each step."""
    peer, work, device = ALL[job.name], job.work, torch.device(job.work.device)
    if why := refusal(peer, device):
        return {"status": "skipped", "why": why}
    use_allowed_cores()  # for all: the number of threads is not what is compared
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
    return row | timed(
        step, config, work.B, work.T, device,
        precision=work.precision, tf32=True, steps=job.steps, warmup=job.warmup, seconds=job.seconds,
    )  # fmt: skip


def compare(c: PeersConfig) -> list[dict]:
    """Run each peer in its own process, all of them in turn, and print a table. The rows are on the disk at once."""
    check_at_least(
        c, batch_size=1, seq_len=1, repetitions=1, steps=1, warmup=1, seconds=0, limit=0, budget=0
    )  # fmt: skip
    if unknown := [name for name in c.peers if name not in ALL]:
        raise UserError(f"--peers {unknown[0]!r}: there are {', '.join(map(repr, ALL))}")
    device = pick_device(c.device)
    precision = pick_precision(c.precision, device)
    cuda, nano = device.type == "cuda", c.size == "nano"
    B = c.batch_size or (64 if cuda else 8 if nano else 4)
    T = c.seq_len or min(SIZES[c.size].block_size, 1024 if cuda else 256)
    work = Work(c.size, B, T, precision, str(device))
    names = list(c.peers or (name for name, peer in ALL.items() if cuda or refusal(peer, device) is None))
    path = c.file or harness.results_file("peers", c.out)
    print(f"{work.size}, B {B}, T {T}, {precision}, on {device_name(device)}; rows in {path}")
    record, end = versions.record(), time.monotonic() + c.budget
    rows: list[dict] = []
    for repetition in range(c.repetitions):
        jobs = [Job(name=name, work=work, steps=c.steps, warmup=c.warmup, seconds=c.seconds) for name in names]
        for name, result in zip(list(names), harness.each_apart(measure, jobs, limit=c.limit, end=end)):
            peer = {**asdict(ALL[name]), "name": name, "ours": ALL[name].ours, "repetition": repetition}
            config = asdict(work) | {"data": "seeded random ids"}
            row = {"suite": "peers", **peer, **result, "config": config, "machine": record}
            row["agrees"] = agrees(row, rows)
            harness.append_row(path, row)
            rows.append(row)
            if row["status"] == "skipped":
                names.remove(name)  # it would be skipped again
            print(f"{repetition + 1}/{c.repetitions}  {name}: {describe(row)}", flush=True)
    print(table(rows))
    return rows


def table(rows: Sequence[dict]) -> str:
    """Return medians over the repetitions as a table; ratios are to the fastest opponent that ran."""
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
            f"{max(row['peak_memory'] for row in good) / 1e9:>9.2f}{ratio:>8}  {percent(good[0]['mfu'])}"
            + ("" if all(row["agrees"] is not False for row in good) else "  losses differ from the first row's")
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    return harness.exit_code(compare(flags.parse(PeersConfig, argv, "benchmarks.peers")))


if __name__ == "__main__":
    run_main(main)
