"""Everything that needs a GPU, in one command and a time budget: `python -m benchmarks.gpu --out DIR`.

    environment   card, driver, versions; measured copy bandwidth and matmul rate, which are the ceilings
    tests         the tests marked gpu or kernel, a process for each file
    kernels       each kernel beside torch's, at GPT-2's shapes
    ladder        tokens/s of gpt2 at B=64, T=1024, rung by rung
    profile       one compiled step's device time by group of kernels, beside the floor
    swaps         the ladder's best torch rung with one op of ours each
    peers         the same step by others, and by ours
    generate      tokens/s of our sample and of transformers' generate
    sanitize      memcheck and racecheck over the kernels at small shapes

Each stage is a process of its own with its own limit. Rows are in DIR/gpu.jsonl as soon as they exist, and what a
stage printed is in DIR/<stage>.log, so a crash, a hang or a dead machine costs what was under way and no more.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import generate, harness, kernels, ladder, peers, step_profile
from benchmarks import sanitize as sanitizer
from gpt2fast import machine
from gpt2fast.device import device_name
from gpt2fast.errors import UserError, run_main

BUDGET = 540.0
# seconds of a stage; and never past the budget: what has no time left is for another call, with --only
LIMITS = {"environment": 60.0, "tests": 180.0, "kernels": 120.0, "ladder": 330.0, "profile": 120.0, "swaps": 400.0,
          "peers": 540.0, "generate": 120.0, "sanitize": 400.0}  # fmt: skip
RUNG_LIMIT = 110.0
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
    files = [path for path in sorted(folder.glob("test_*.py")) if re.search(r"mark\.(gpu|kernel)\b", path.read_text())]
    arguments = ["-m", "gpu or kernel", "-q", "-p", "no:cacheprovider"]

    def run(path: Path) -> dict:
        log = options.out / f"{path.stem}.log"
        result = harness.run_apart("pytest", *arguments, path, limit=options.limit - 10, log=log)
        return {"file": path.name, **result, **count_tests(log.read_text(errors="replace"))}

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


def climb(options: argparse.Namespace, device: torch.device, rungs: Sequence[str] = tuple(ladder.CLIMB)) -> None:
    """The ladder, its rows in the same file."""
    arguments = ["--size", options.size, "--batch-size", str(options.batch_size), "--seq-len", str(options.seq_len)]
    arguments += ["--device", str(device), "--limit", str(RUNG_LIMIT), "--budget", str(options.limit - 15)]
    arguments += ["--seconds", "6", "--file", str(options.out / "gpu.jsonl"), "--rungs", *rungs]
    if ladder.main(arguments):
        raise SystemExit(1)


def kernel_times(options: argparse.Namespace, device: torch.device) -> None:
    """Each kernel beside torch's, its rows in the same file; those that come first matter most."""
    arguments = ["--device", str(device), "--budget", str(options.limit - 25), "--file", str(options.out / "gpu.jsonl")]
    if kernels.main(arguments):
        raise SystemExit(1)


def profiles(options: argparse.Namespace, device: torch.device) -> None:
    """A step of each backend, by group of kernels."""
    for backend in ("torch", "triton"):
        row = step_profile.measure(backend, options.size, options.batch_size, options.seq_len, device, compile=True)
        write(options, "profile", row)
        print(step_profile.table(row), flush=True)


def swaps(options: argparse.Namespace, device: torch.device) -> None:
    """The same, of single ops."""
    climb(options, device, ["fused", *ladder.SWAPS])


def step_peers(options: argparse.Namespace, device: torch.device) -> None:
    """One turn of each peer, its rows in the same file."""
    arguments = ["--size", options.size, "--batch-size", str(options.batch_size), "--seq-len", str(options.seq_len)]
    arguments += ["--device", str(device), "--repetitions", "1", "--seconds", "5", "--limit", str(RUNG_LIMIT)]
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
    "environment": environment, "tests": gpu_tests, "kernels": kernel_times, "ladder": climb, "profile": profiles,
    "swaps": swaps, "peers": step_peers, "generate": texts, "sanitize": sanitize,
}  # fmt: skip


def write(options: argparse.Namespace, stage: str, row: dict) -> None:
    harness.append_row(options.out / "gpu.jsonl", {"suite": "gpu", "stage": stage, **row})


def run_stages(options: argparse.Namespace, names: Sequence[str]) -> list[dict]:
    """Each in its own process, while the budget lasts."""
    end = time.monotonic() + options.budget
    record = machine.record()
    rows = []
    for name in names:
        left = end - time.monotonic()
        limit = min(LIMITS[name], left)
        if limit < 20:
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
    """The rows of a file, for people: ceilings, tests, ladder, profile."""
    lines, rungs = [], []
    for row in map(json.loads, path.read_text().splitlines()):
        if row.get("measured") == "copy":
            lines.append(f"copy        {row['gb_per_s']['median']:,.0f} GB/s, read + written")
        elif row.get("measured"):
            lines.append(f"matmul      {row['tflops']['median']:,.0f} TFLOP/s bf16 at M, N, K = {row['shape']}")
        elif "passed" in row or "failed" in row:
            lines.append(f"{row['file']:<28}{row.get('passed', 0)} passed, {row.get('failed', 0)} failed")
        elif row["suite"] in ("peers", "generate"):
            lines.append(f"{row['name']:<36}{peers.describe(row)}")
        elif row["suite"] == "kernels":
            lines.append(kernels.describe(row))
        elif "groups" in row:
            lines.append(step_profile.table(row))
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
    rows = run_stages(options, options.only or list(STAGES))
    print(summary(options.out / "gpu.jsonl"))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
