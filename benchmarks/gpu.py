"""Run everything that needs a GPU: `python -m benchmarks.gpu --out DIR`.

    environment   card, driver, versions; measured copy bandwidth and matmul rate, which are the ceilings
    kernels       each kernel beside torch's, at GPT-2 124M's shapes, then at more lengths and those of the other sizes
    ladder        tokens/s of gpt2 at B=64, T=1024: torch, our kernels, all options of ours, then each alone
    profile       one compiled step's device time by group of kernels, torch's and ours, beside the floor
    peers         the same step as others write it, and ours

These are the default. The others run when `--only STAGE ...` names them:

    tests         the tests marked gpu or kernel, a process for each file
    tune          each kernel's launch settings against others
    sizes         tokens/s and memory of four sizes, with and without activation checkpointing
    options       200 steps of nano with each option: loss curves within the spread of seeds
    swaps         the ladder's fastest torch rung with one op of ours each; ours with one option less each
    generate      tokens/s of our sample and of transformers' generate
    sanitize      memcheck and racecheck over the kernels at small shapes

For a first session: the default, which verifies kernels before it times them; then `--only tests tune`, and launch.py
changed as tune says; then `--only ladder profile sizes`, which is the result. While a kernel is being tuned, use
`--only kernels` or `python -m benchmarks.tune --kernel attention`.

Each stage is a process of its own. With `--budget`, a stage gets its share of the time that is left for it and those
after it, so that no stage starves another and time that one does not need goes to the next; stages that no longer fit
are left out, with a row that says so. The ladder comes before profile and peers, whose compiled graphs it leaves in
Inductor's cache on the disk. Rows are in DIR/gpu.jsonl at once, and what a stage printed is in DIR/<stage>.log, so a
crash, a hang or a dead machine costs what was being measured and no more.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import flags, floor, harness, kernels, ladder, step_profile, tune
from benchmarks.gpu_stages import DEFAULT, STAGES, GpuConfig, write
from benchmarks.rows import rows_of
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.machine import versions
from gpt2fast.machine.device import device_name

SPARE = 20.0  # seconds of its limit that a stage does not plan for, so that it ends by itself
DESCRIBED = {"kernels": kernels.describe, "tune": tune.describe}  # by suite


@dataclass(frozen=True)
class Job:
    """What the process of a stage gets; `seconds` are those that it plans for."""

    stage: str
    config: GpuConfig
    seconds: float
    device: str


def run_stage(job: Job) -> None:
    """Run a stage in this process; a nonzero exit code says that something was wrong."""
    if STAGES[job.stage].run(job.config, torch.device(job.device), job.seconds):
        raise SystemExit(1)


def run_stages(c: GpuConfig, names: Sequence[str], device: str = "cuda") -> list[dict]:
    """Run each stage in a process of its own, for at most its share of the time that is left."""
    end, record, rows = time.monotonic() + c.budget, versions.record(), []
    for i, name in enumerate(names):
        left = end - time.monotonic()
        share = left * STAGES[name].share / sum(STAGES[later].share for later in names[i:])
        limit = min(c.limit, left, max(share, harness.SHORTEST))
        if limit < harness.SHORTEST:
            print(f"{name}: left out, {limit:.0f} s are too few: raise --budget, or use --only {name}", flush=True)
            row = {"status": "no time left", "seconds": 0.0}
        else:
            print(f"{name} (at most {limit:.0f} s) ...", end=" ", flush=True)
            job = Job(name, c, max(0.0, limit - SPARE), device)
            row = harness.apart(run_stage, job, limit=limit, log=c.out / f"{name}.log")
            print(f"{row['status']}, {row['seconds']:.0f} s", flush=True)
        write(c, name, {**row, "machine": record})
        rows.append({"stage": name, **row})
    return rows


def summary(path: Path) -> str:
    """Return the rows of a file as a text."""
    lines: list[str] = []
    rungs: dict[tuple, list[dict]] = {}
    rows = rows_of(path)
    for row in rows:
        if row.get("measured") == "copy":
            lines.append(f"copy        {row['gb_per_s']['median']:,.0f} GB/s, read + written")
        elif row.get("measured"):
            lines.append(f"matmul      {row['tflops']['median']:,.0f} TFLOP/s bf16 at M, N, K = {row['shape']}")
        elif "passed" in row or "failed" in row:
            lines.append(f"{row['file']:<28}{row.get('passed', 0)} passed, {row.get('failed', 0)} failed")
        elif row["suite"] in ("peers", "generate"):
            lines.append(f"{row['name']:<36}{ladder.describe(row)}")
        elif row["suite"] in DESCRIBED:
            lines.append(DESCRIBED[row["suite"]](row))
        elif "groups" in row:
            lines.append(step_profile.table(row, floor.ceilings_of(rows) or floor.Ceilings()))
        elif row["suite"] == "ladder":
            shape = tuple(row["config"][name] for name in ("size", "B", "T"))
            rungs.setdefault(shape, []).append(row)
        elif row.get("status") not in (None, "ok"):
            lines.append(f"{row['stage']}: {row['status']}: {row.get('why') or row.get('tail', '').strip()[-300:]}")
    for (size, B, T), found in rungs.items():
        lines += [f"{size}, B {B}, T {T}", ladder.table(found)]
    return "\n".join(lines)


def run(c: GpuConfig) -> int:
    """Run the stages that were asked for, and return 1 if one was not ok, else 0."""
    check_at_least(c, budget=0, limit=0, process_limit=0, jobs=1, batch_size=1, seq_len=1)
    if unknown := [name for name in c.only if name not in STAGES]:
        raise UserError(f"--only {unknown[0]}: there are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        raise UserError(
            f"benchmarks.gpu needs a CUDA GPU, and torch {torch.__version__} sees none: use benchmarks.ladder"
        )
    print(f"{device_name(torch.device('cuda'))}; rows in {c.rows}")
    rows = run_stages(c, c.only or DEFAULT)
    print(summary(c.rows))
    return int(any(row["status"] != "ok" for row in rows))


def main(argv: Sequence[str]) -> int:
    return run(flags.parse(GpuConfig, argv, "benchmarks.gpu"))


if __name__ == "__main__":
    run_main(main)
