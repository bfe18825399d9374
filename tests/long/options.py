"""A check that every option learns alike: `python -m tests.long.options` compares 200 steps of nano with other seeds'.

An option (a kernel, our optimizer, a residual stream in bf16, activation checkpointing, ...) changes speed, memory and
rounding. So it must not change the loss more than another seed does: in each window of 20 steps, its mean loss must be
closer to that of the torch backend with the same seed than the torch backend's seeds are to each other at most. Without
a GPU, options that need Triton run in its interpreter and therefore in fp32, all others in bf16; on a GPU all run in
bf16 and compiled. Each run is a separate process and a row with every loss. The default batch of 2 sequences is small,
since the interpreter takes seconds for a step of 256 x 50,304 logits.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import flags, harness
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.machine import versions
from gpt2fast.machine.device import Precision, device_name, pick_device
from gpt2fast.ops import NAMES, OpsConfig
from gpt2fast.training import run
from gpt2fast.training.config import PRESETS, TrainConfig

WINDOW = 20  # steps
SEEDS = (1, 2, 3, 4)
LIMIT = 7200.0  # seconds of a run


@dataclass(frozen=True)
class Option:
    """The settings of a run that differ from the torch backend's. `triton`: interpreted without a GPU."""

    changes: dict = field(default_factory=dict)
    triton: bool = False
    cuda: bool = False  # works on CUDA only


OPTIONS = {
    name: Option({"ops": OpsConfig(**{name: "triton"})}, triton=True)  # type: ignore[arg-type]  # an op's name
    for name in NAMES
}
OPTIONS |= {
    "epilogue": Option({"ops": OpsConfig(mlp="epilogue")}, triton=True),
    "optimizer": Option({"optimizer": "triton"}, triton=True),
    "all ours": Option({"backend": "triton", "optimizer": "triton"}, triton=True),
    "residual": Option({"residual": "low"}),
    "checkpointing": Option({"recompute": True}),
    "accumulation": Option({"batch_size": 1}),  # with several micro-batches, weights are rounded once a step
    "compile": Option({"compile": "on"}),
    "cuda graph": Option({"cuda_graph": True}, cuda=True),
}


def precision(option: Option, device: torch.device) -> Precision:
    return "fp32" if option.triton and device.type == "cpu" else "bf16"


@dataclass(frozen=True, kw_only=True)
class OptionsConfig:
    """Train nano with each option, and compare the losses with the spread of seeds."""

    option: tuple[str, ...] = tuple(OPTIONS)
    """Options to run."""
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 2
    """Sequences of 128 tokens in a step."""
    device: str = "auto"
    """Device to compute on."""
    jobs: int = 2
    """Runs at a time, on a CPU."""
    file: Path | None = None
    """File to append the rows to. None: a new one in benchmarks/results."""


@dataclass(frozen=True)
class Job:
    """One run: `option` is a name in OPTIONS, or "torch"."""

    option: str
    seed: int
    precision: Precision
    device: str
    steps: int
    batch_size: int


def settings(job: Job, out: Path) -> TrainConfig:
    """Return the settings of nano, without validation, samples and checkpoints."""
    nano = replace(
        PRESETS["nano"], batch_size=job.batch_size, total_batch=job.batch_size * PRESETS["nano"].seq_len,
        steps=job.steps, seed=job.seed, precision=job.precision, device=job.device, val_every=0, sample_every=0,
        checkpoint_every=0, compile="off" if job.device == "cpu" else "on", out=out, run="run",
        optimizer="torch", residual="fp32",
    )  # fmt: skip
    return replace(nano, **OPTIONS.get(job.option, Option()).changes)


def one(job: Job) -> dict:
    """Train in this process, and return the losses."""
    from gpt2fast.train import train

    with tempfile.TemporaryDirectory() as folder:
        config = settings(job, Path(folder))
        if train(config):
            raise SystemExit(1)
        rows = run.read_metrics(config.folder / "metrics.jsonl")
    return {"status": "ok", "losses": [row["loss"] for row in rows if "loss" in row]}


def apart(job: Job, interpret: bool) -> dict:
    """Train in a separate process, and return a row."""
    environment = {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = harness.apart(one, job, limit=LIMIT, environment=environment if job.device == "cpu" else {})
    row = {"option": job.option, "seed": job.seed, "precision": job.precision, "losses": [], **done}
    print(f"{job.precision} {job.option:<22} seed {job.seed}: {describe(row)}", flush=True)
    return row


def describe(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {' '.join(row['tail'].split())[-200:]}"
    return f"loss {row['losses'][0]:.3f} -> {windows(row['losses'])[-1]:.3f}, {row['seconds']:.0f} s"


def windows(losses: Sequence[float]) -> list[float]:
    """Return the means of WINDOW steps each; the last window may be shorter."""
    return [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]


def verdicts(rows: Sequence[dict]) -> list[dict]:
    """Return each option's largest difference from the reference of its seed, as a share of the seeds' spread."""
    found = []
    for kind in dict.fromkeys(row["precision"] for row in rows):
        good = [row for row in rows if row["precision"] == kind and row["status"] == "ok"]
        reference = {row["seed"]: windows(row["losses"]) for row in good if row["option"] == "torch"}
        if len(reference) < 2:
            continue
        spread = [max(at) - min(at) for at in zip(*reference.values())]
        for row in good:
            if row["option"] != "torch":
                pairs = zip(windows(row["losses"]), reference[row["seed"]], spread)
                differences = [(abs(a - b), abs(a - b) / s) for a, b, s in pairs]
                nats, share = max(differences, key=lambda difference: difference[1])
                found.append({"option": row["option"], "precision": kind, "nats": nats, "share": share})
    return found


def table(found: Sequence[dict]) -> str:
    lines = [f"{'option':<24}{'precision':<11}{'largest, nats':>15}{'of seeds spread':>21}"]
    for row in found:
        mark = "" if row["share"] <= 1 else "  TOO FAR"
        lines.append(f"{row['option']:<24}{row['precision']:<11}{row['nats']:>15.4f}{row['share']:>20.0%}{mark}")
    return "\n".join(lines)


def plan(names: Sequence[str], device: torch.device) -> list[tuple[str, int, Precision, bool]]:
    """Return (option, seed, precision, interpreted?) of every run: the interpreted ones, which are slowest, first."""
    chosen = {name: OPTIONS[name] for name in names if device.type == "cuda" or not OPTIONS[name].cuda}
    kinds = dict.fromkeys(precision(option, device) for option in chosen.values())
    runs = [(name, SEEDS[0], precision(o, device), o.triton and device.type == "cpu") for name, o in chosen.items()]
    runs += [("torch", seed, kind, False) for kind in kinds for seed in SEEDS]
    return sorted(runs, key=lambda r: (not r[3], r[0] != "all ours"))


def main(argv: Sequence[str], do: Callable[[Job, bool], dict] = apart) -> int:
    c = flags.parse(OptionsConfig, argv, "tests.long.options")
    check_at_least(c, steps=1, batch_size=1, jobs=1)
    if unknown := set(c.option) - set(OPTIONS):
        raise UserError(f"--option {min(unknown)}: there are {', '.join(OPTIONS)}")
    device = pick_device(c.device)
    path = c.file or harness.results_file("options")
    print(f"{c.steps} steps of nano, B {c.batch_size}, on {device_name(device)}; rows in {path}")
    record, start = versions.record(), time.monotonic()
    rows = []
    with ThreadPoolExecutor(c.jobs if device.type == "cpu" else 1) as pool:
        jobs = [
            (Job(name, seed, kind, str(device), c.steps, c.batch_size), interpret)
            for name, seed, kind, interpret in plan(c.option, device)
        ]
        for row in pool.map(lambda job: do(*job), jobs):
            harness.append_row(path, {"suite": "options", **row, "machine": record})
            rows.append(row)
    found = verdicts(rows)
    print(table(found))
    print(f"{len(rows)} runs in {time.monotonic() - start:.0f} s")
    return int(any(row["status"] != "ok" for row in rows) or any(row["share"] > 1 for row in found))


if __name__ == "__main__":
    run_main(main)
