"""Everything that needs a GPU, in one command and a time budget: `python -m benchmarks.gpu --out DIR`.

    environment   card, driver, versions; measured copy bandwidth and matmul rate, which are the ceilings
    kernels       each kernel beside torch's, at GPT-2 124M's shapes; with time left, at those of the other sizes
    ladder        tokens/s of gpt2 at B=64, T=1024: torch, our kernels, all options of ours, then each alone
    profile       one compiled step's device time by group of kernels, torch's and ours, beside the floor
    peers         the same step by others, and by ours

These are the default, nine minutes together, what matters most first. By `--only STAGE`, which may be repeated:

    tests         the tests marked gpu or kernel, a process for each file
    tune          each kernel's launch settings against others
    scale         four sizes and several lengths: tokens/s, memory, the largest batch, what checkpointing costs
    options       200 steps of nano with each option: loss curves within the spread of seeds
    swaps         the ladder's best torch rung with one op of ours each; ours with one option less each
    generate      tokens/s of our sample and of transformers' generate
    sanitize      memcheck and racecheck over the kernels at small shapes

Who has 30 minutes makes three calls, each of which ends by itself before ten minutes: first the default, whose kernels
are verified before they are timed; second `--only tests --only tune`, and takes over what tune says of launch.py; third
`--only ladder --only profile --only scale`, which is the result. `--only options`, `swaps` and `sanitize` are for
another day. A loop of tuning is `--only kernels` or `python -m benchmarks.tune --kernel attention`.

Each stage is a process of its own. It may take what is left of the budget but for the seconds that PLAN keeps for those
behind it, so none starves another, and what one leaves is the next one's. The ladder comes before profile and peers,
whose compiled graphs it leaves in Inductor's cache on the disk. Rows are in DIR/gpu.jsonl as soon as they exist, and
what a stage printed is in DIR/<stage>.log, so a crash, a hang or a dead machine costs what was under way and no more.
"""

import argparse
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import floor, generate, harness, kernels, ladder, peers, scale, step_profile, tune
from benchmarks import sanitize as sanitizer
from benchmarks.rows import rows_of
from benchmarks.rungs import ADDED, ALL, FUSED, SWAPS, WITHOUT, Rung
from benchmarks.rungs import RUNGS as KNOWN
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.machine import versions
from gpt2fast.machine.device import device_name

BUDGET = 540.0
# Seconds that a stage is expected to need. Assumed: 10 s to start a process, 45 s to compile a step, 15 s to find it
# compiled on the disk, 10 s a case of kernels.
PLAN = {
    "environment": 25.0, "kernels": 90.0, "ladder": 190.0, "profile": 55.0, "peers": 180.0, "tests": 180.0,
    "tune": 340.0, "scale": 270.0, "options": 500.0, "swaps": 300.0, "generate": 100.0, "sanitize": 300.0,
}  # fmt: skip
DEFAULT = ("environment", "kernels", "ladder", "profile", "peers")
LEAST = 20.0  # a stage is not begun with less
RUNG_LIMIT = 120.0
JOBS = 3  # rungs that compile at a time: their memory is that of as many steps at B=64, 30 to 55 GB each
RUNGS = ("fused", "all", "triton", "graph", *ADDED, "visible", "recompute", "bf16")  # what matters most comes first
PEERS = ("textbook compiled", "triton compiled", "torch compiled", "transformers compiled", "liger eager",
         "textbook eager", "transformers eager", "liger compiled", "torch max-autotune")  # fmt: skip
COPY_BYTES = 4 * 2**30
# (M, N, K) of x (M, K) w^T (K, N): the usual yardstick, then GPT-2 124M's own at B=64, T=1024
MATMULS = [(8192, 8192, 8192)] + [
    (65536, n, k) for n, k in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50304, 768))
]


def environment(
    options: argparse.Namespace, device: torch.device, copy_bytes: int = COPY_BYTES, matmuls=MATMULS
) -> None:
    """The ceilings, one row each."""
    write(options, "environment", {"measured": "copy", **harness.copy_bandwidth(device, copy_bytes)})
    for shape in matmuls:
        write(options, "environment", {"measured": "matmul bf16", **harness.matmul_rate(device, *shape)})


def gpu_tests(options: argparse.Namespace, device: torch.device) -> None:
    """A row with the counts of each file, even if some tests fail or hang. All at once: most of it is compiling."""
    folder = harness.ROOT / "tests"
    files = [path for path in sorted(folder.rglob("test_*.py")) if re.search(r"mark\.(gpu|kernel)\b", path.read_text())]
    arguments = ["-m", "gpu or kernel", "-q", "-p", "no:cacheprovider"]

    def run(path: Path) -> dict:
        log = options.out / f"{path.stem}.log"
        result = harness.run_apart("pytest", *arguments, path, limit=options.limit - 10, log=log)
        return {"file": str(path.relative_to(folder)), **result, **count_tests(log.read_text(errors="replace"))}

    with ThreadPoolExecutor(len(files)) as pool:
        rows = list(pool.map(run, files))
    for row in rows:
        write(options, "tests", row)
        print(row)
    if any(row["status"] != "ok" for row in rows):
        raise SystemExit(1)


def count_tests(output: str) -> dict[str, int]:
    """pytest's closing line -> {"passed": 3, "failed": 1, ...}."""
    closing = [line for line in output.splitlines() if re.search(r" in [\d.]+s", line)]
    return (
        {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", closing[-1])}
        if closing
        else {}
    )


def climb(options: argparse.Namespace, device: torch.device, rungs: Sequence[str] = RUNGS) -> None:
    """The ladder, its rows in the same file."""
    arguments = ["--size", options.size, "--batch-size", str(options.batch_size), "--seq-len", str(options.seq_len)]
    arguments += ["--device", str(device), "--limit", str(RUNG_LIMIT), "--budget", str(options.limit - 15)]
    arguments += ["--jobs", str(JOBS if device.type == "cuda" else 1), "--steps", "40", "--seconds", "6"]
    arguments += ["--file", str(options.out / "gpu.jsonl"), "--rungs", *rungs]
    if ladder.main(arguments):
        raise SystemExit(1)


def kernel_times(options: argparse.Namespace, device: torch.device) -> None:
    """Each kernel beside torch's, its rows in the same file; those that come first matter most."""
    few = ["--size", options.size, "--lengths", *(str(n * options.seq_len) for n in (1, 4))]
    arguments = ["--device", str(device), "--budget", str(options.limit - 25), "--file", str(options.out / "gpu.jsonl")]
    if kernels.main([*arguments, *(few if options.limit < 2 * PLAN["kernels"] else [])]):
        raise SystemExit(1)


def profiles(options: argparse.Namespace, device: torch.device) -> None:
    """A step of torch's best rung and of ours, by group of kernels."""
    rows = rows_of(options.out / "gpu.jsonl") if (options.out / "gpu.jsonl").exists() else []
    ceilings = floor.ceilings_of(rows) or floor.Ceilings()
    for rung in (FUSED, best_of_ours(rows)):
        row = step_profile.measure(rung, options.size, options.batch_size, options.seq_len, device)
        write(options, "profile", row)
        print(step_profile.table(row, ceilings), flush=True)


def best_of_ours(rows: Sequence[dict]) -> Rung:
    """The fastest in the ladder; without a graph, whose replay tells the same kernels but takes long to profile."""
    ran = [row for row in rows if row["suite"] == "ladder" and row["status"] == "ok" and row["rung"] in KNOWN]
    speeds = {KNOWN[row["rung"]]: row["tokens_per_s"]["median"] for row in ran}
    ours = [rung for rung in speeds if rung.backend == "triton" and not rung.cuda_graph]
    return max(ours, key=speeds.__getitem__, default=ALL)


def swaps(options: argparse.Namespace, device: torch.device) -> None:
    """The same, of single ops, and of single options."""
    climb(options, device, ["fused", *SWAPS, "all", *WITHOUT])


def tuning(options: argparse.Namespace, device: torch.device) -> None:
    """Launch settings, its rows in the same file."""
    if tune.main(["--budget", str(options.limit - 20), "--file", str(options.out / "gpu.jsonl")]):
        raise SystemExit(1)


def scaling(options: argparse.Namespace, device: torch.device) -> None:
    """Sizes and lengths, its rows in the same file."""
    arguments = ["--budget", str(options.limit - 15), "--limit", str(RUNG_LIMIT), "--device", str(device)]
    if scale.main([*arguments, "--file", str(options.out / "gpu.jsonl")]):
        raise SystemExit(1)


def curves(options: argparse.Namespace, device: torch.device) -> None:
    """Loss curves of each option, its rows in the same file."""
    arguments = ["--device", device, "--file", options.out / "gpu.jsonl"]
    row = harness.run_apart("tests.long.options", *arguments, limit=options.limit - 10, log=options.out / "curves.log")
    print((options.out / "curves.log").read_text(errors="replace"))
    if row["status"] != "ok":
        raise SystemExit(1)


def step_peers(options: argparse.Namespace, device: torch.device) -> None:
    """One turn of each peer, its rows in the same file."""
    arguments = ["--size", options.size, "--batch-size", str(options.batch_size), "--seq-len", str(options.seq_len)]
    arguments += ["--device", str(device), "--repetitions", "1", "--seconds", "5", "--limit", str(RUNG_LIMIT)]
    arguments += ["--peers", *PEERS] if device.type == "cuda" else []
    if peers.main([*arguments, "--budget", str(options.limit - 15), "--file", str(options.out / "gpu.jsonl")]):
        raise SystemExit(1)


def texts(options: argparse.Namespace, device: torch.device) -> None:
    """Ours and transformers', its rows in the same file."""
    arguments = ["--size", options.size, "--device", str(device), "--repetitions", "1", "--limit", str(RUNG_LIMIT / 2)]
    if generate.main([*arguments, "--file", str(options.out / "gpu.jsonl")]):
        raise SystemExit(1)


def sanitize(options: argparse.Namespace, device: torch.device) -> None:
    """compute-sanitizer's verdicts, a row for each tool."""
    rows = sanitizer.check_all(options.limit - 10, options.out)
    for row in rows:
        write(options, "sanitize", row)
        print(row)
    if any(row["status"] != "ok" for row in rows):
        raise SystemExit(1)


STAGES = {
    "environment": environment, "kernels": kernel_times, "ladder": climb, "profile": profiles, "peers": step_peers,
    "tests": gpu_tests, "tune": tuning, "scale": scaling, "options": curves, "swaps": swaps, "generate": texts,
    "sanitize": sanitize,
}  # fmt: skip


DESCRIBED = {  # by suite
    "kernels": kernels.describe, "tune": tune.describe, "scale": scale.describe,
}  # fmt: skip


def write(options: argparse.Namespace, stage: str, row: dict) -> None:
    harness.append_row(options.out / "gpu.jsonl", {"suite": "gpu", "stage": stage, **row})


def run_stages(options: argparse.Namespace, names: Sequence[str]) -> list[dict]:
    """Each in its own process, with what is left of the budget but for those behind it."""
    end = time.monotonic() + options.budget
    record = versions.record()
    rows = []
    for i, name in enumerate(names):
        left = end - time.monotonic()
        limit = min(left, max(PLAN[name], left - sum(PLAN[later] for later in names[i + 1 :])))
        if limit < LEAST:
            print(f"{name}: skipped, {options.budget:.0f} s for all stages are over: --only {name}", flush=True)
            row = {"status": "no time left", "seconds": 0.0}
        else:
            print(f"{name} (at most {limit:.0f} s) ...", end=" ", flush=True)
            arguments = ["--out", options.out, "--size", options.size, "--batch-size", options.batch_size]
            arguments += ["--seq-len", options.seq_len, "--device", options.device, "--limit", limit, "--stage", name]
            row = harness.run_apart("benchmarks.gpu", *arguments, limit=limit, log=options.out / f"{name}.log")
            print(f"{row['status']}, {row['seconds']:.0f} s", flush=True)
        write(options, name, {**row, "machine": record})
        rows.append({"stage": name, **row})
    return rows


def summary(path: Path) -> str:
    """The rows of a file, for people."""
    lines, rungs = [], []
    rows = rows_of(path)
    for row in rows:
        if row.get("measured") == "copy":
            lines.append(f"copy        {row['gb_per_s']['median']:,.0f} GB/s, read + written")
        elif row.get("measured"):
            lines.append(f"matmul      {row['tflops']['median']:,.0f} TFLOP/s bf16 at M, N, K = {row['shape']}")
        elif "passed" in row or "failed" in row:
            lines.append(f"{row['file']:<28}{row.get('passed', 0)} passed, {row.get('failed', 0)} failed")
        elif row["suite"] in ("peers", "generate"):
            lines.append(f"{row['name']:<36}{peers.describe(row)}")
        elif row["suite"] in DESCRIBED:
            lines.append(DESCRIBED[row["suite"]](row))
        elif "groups" in row:
            lines.append(step_profile.table(row, floor.ceilings_of(rows) or floor.Ceilings()))
        elif row["suite"] == "ladder":
            rungs.append(row)
        elif row.get("status") not in (None, "ok"):
            lines.append(f"{row['stage']}: {row['status']}: {row.get('why') or row.get('tail', '').strip()[-300:]}")
    return "\n".join([*lines, ladder.table(rungs)] if rungs else lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder of rows and logs")
    p.add_argument("--only", action="append", choices=STAGES, help="this stage; may be repeated")
    p.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    p.add_argument("--size", choices=ladder.SIZES, default="gpt2")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--seq-len", type=int, default=1024)
    p.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # what a stage's process gets
    p.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    p.add_argument("--limit", type=float, default=BUDGET, help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    if options.stage:
        STAGES[options.stage](options, torch.device(options.device))
        return 0
    if not torch.cuda.is_available():
        raise UserError(
            f"benchmarks.gpu needs a CUDA GPU, and torch {torch.__version__} sees none: use benchmarks.ladder"
        )
    print(f"{device_name(torch.device('cuda'))}; rows in {options.out / 'gpu.jsonl'}")
    rows = run_stages(options, options.only or DEFAULT)
    print(summary(options.out / "gpu.jsonl"))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
