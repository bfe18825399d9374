"""The stages of benchmarks.gpu: each calls one of the other benchmarks, and appends its rows to one file.

A stage is a function of the settings, a device, and the seconds that it may plan for. It returns 0, or a number that
is not 0 if something was wrong.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import flags, floor, generate, harness, kernels, ladder, peers, step_profile, tune
from benchmarks import sanitize as sanitizer
from benchmarks.rows import rows_of
from benchmarks.rungs import ADDED, ALL, FUSED, SWAPS, WITHOUT, Rung
from benchmarks.rungs import RUNGS as KNOWN
from gpt2fast.model import SIZES
from gpt2fast.training.config import TrainConfig, default_batch_size

RUNGS = ("fused", "all", "triton", "graph", *ADDED, "recompute", "bf16")  # those that matter most first
PEERS = ("textbook compiled", "triton compiled", "torch compiled", "transformers compiled", "liger eager",
         "textbook eager", "transformers eager", "liger compiled", "torch max-autotune")  # fmt: skip
# (M, N, K) of x (M, K) w^T (K, N): the usual yardstick, then GPT-2 124M's own at B=64, T=1024
MATMULS = [harness.MATMUL] + [
    (65536, n, k) for n, k in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50304, 768))
]


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Run everything that needs a GPU, each stage in a process of its own."""

    out: Path = Path("results")
    """Folder of rows and logs."""
    only: tuple[str, ...] = ()
    """Stages: environment, kernels, ladder, profile, peers, tests, tune, sizes, options, swaps, generate, sanitize.
    None named: the first five."""
    budget: float = math.inf
    """Seconds for all stages; those that no longer fit are left out."""
    limit: float = 3600.0
    """Seconds for a stage."""
    process_limit: float = 300.0
    """Seconds for each process of ladder, peers and generate."""
    jobs: int = 3
    """Rungs of the ladder that compile at a time; each holds the memory of a step, 30 to 55 GB for gpt2 at B=64."""
    size: flags.Size = "gpt2"
    """Model."""
    batch_size: int = 64
    """Sequences in a batch, B."""
    seq_len: int = 1024
    """Tokens in a sequence, T."""

    @property
    def rows(self) -> Path:
        """The file of all rows."""
        return self.out / "gpu.jsonl"


def write(c: GpuConfig, stage: str, row: dict) -> None:
    """Append a row of a stage."""
    harness.append_row(c.rows, {"suite": "gpu", "stage": stage, **row})


def environment(
    c: GpuConfig, device: torch.device, seconds: float, copy_bytes: int = harness.COPY_BYTES, matmuls=MATMULS
) -> int:
    """Measure the ceilings, a row each."""
    write(c, "environment", {"measured": "copy", **harness.copy_bandwidth(device, copy_bytes)})
    for shape in matmuls:
        write(c, "environment", {"measured": "matmul bf16", **harness.matmul_rate(device, *shape)})
    return 0


def kernel_times(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Time each kernel beside torch's, beginning with the shapes of this run's size."""
    others = (size for size in SIZES if size not in ("nano", c.size))
    sizes = (c.size, *others) if device.type == "cuda" else (c.size,)
    return kernels.run(
        kernels.KernelsConfig(size=sizes, device=str(device), budget=seconds, file=c.rows)  # type: ignore[arg-type]
    )


def climb(
    c: GpuConfig,
    device: torch.device,
    seconds: float,
    rungs: Sequence[str] = RUNGS,
    size: flags.Size | None = None,
    batch_size: int | None = None,
) -> int:
    """Climb the ladder."""
    config = ladder.LadderConfig(
        size=size or c.size, batch_size=batch_size or c.batch_size, seq_len=c.seq_len, steps=40, seconds=6.0,
        limit=c.process_limit, budget=seconds, device=str(device), rungs=tuple(rungs), file=c.rows,
        jobs=c.jobs if device.type == "cuda" else 1,
    )  # fmt: skip
    return harness.exit_code(ladder.climb(config))


def profiles(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Profile a step of torch's fastest rung and of ours, by group of kernels."""
    rows = rows_of(c.rows) if c.rows.exists() else []
    ceilings = floor.ceilings_of(rows) or floor.Ceilings()
    for rung in (FUSED, best_of_ours(rows)):
        row = step_profile.measure(rung, c.size, c.batch_size, c.seq_len, device)
        write(c, "profile", row)
        print(step_profile.table(row, ceilings), flush=True)
    return 0


def best_of_ours(rows: Sequence[dict]) -> Rung:
    """Return our fastest rung of the ladder, but no CUDA graph: it runs the same kernels and takes long to profile."""
    ran = [row for row in rows if row["suite"] == "ladder" and row["status"] == "ok" and row["rung"] in KNOWN]
    speeds = {KNOWN[row["rung"]]: row["tokens_per_s"]["median"] for row in ran}
    ours = [rung for rung in speeds if rung.backend == "triton" and not rung.cuda_graph]
    return max(ours, key=speeds.__getitem__, default=ALL)


def step_peers(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Run one turn of each peer."""
    config = peers.PeersConfig(
        size=c.size, batch_size=c.batch_size, seq_len=c.seq_len, device=str(device), repetitions=1, seconds=5.0,
        limit=c.process_limit, budget=seconds, peers=PEERS if device.type == "cuda" else (), file=c.rows,
    )  # fmt: skip
    return harness.exit_code(peers.compare(config))


def gpu_tests(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Run the tests of each file in a process, all at once, since most of it is compiling. A row holds a file's counts.

    Tests that fail or hang cost the row of their file only.
    """
    folder = harness.ROOT / "tests"
    files = [path for path in sorted(folder.rglob("test_*.py")) if re.search(r"mark\.(gpu|kernel)\b", path.read_text())]
    arguments = ["-m", "gpu or kernel", "-q", "-p", "no:cacheprovider"]

    def run(path: Path) -> dict:
        log = c.out / f"{path.parent.name}_{path.stem}.log"  # two folders may have a file of one name
        result = harness.run_apart("pytest", *arguments, path, limit=seconds, log=log)
        return {"file": str(path.relative_to(folder)), **result, **count_tests(log.read_text(errors="replace"))}

    with ThreadPoolExecutor(len(files)) as pool:
        rows = list(pool.map(run, files))
    for row in rows:
        write(c, "tests", row)
        print(row)
    return harness.exit_code(rows)


def count_tests(output: str) -> dict[str, int]:
    """Return {"passed": 3, "failed": 1, ...} from pytest's closing line."""
    closing = [line for line in output.splitlines() if re.search(r" in [\d.]+s", line)]
    return (
        {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", closing[-1])}
        if closing
        else {}
    )


def tuning(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Try launch settings."""
    return tune.run(tune.TuneConfig(budget=seconds, file=c.rows))


def sizes(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Climb three rungs with each size, at the batch that training would choose for this device's memory."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    end, failed = time.monotonic() + seconds, 0
    names: tuple[flags.Size, ...] = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    for size in names:
        B = default_batch_size(TrainConfig(model=SIZES[size], seq_len=c.seq_len), memory)
        left = max(0.0, end - time.monotonic())
        failed |= climb(c, device, left, ("all", "recompute", "fused"), size=size, batch_size=B)
    return failed


def curves(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Compare the loss curves of each option."""
    log = c.out / "curves.log"
    arguments = ["--device", device, "--file", c.rows]
    row = harness.run_apart("tests.long.options", *arguments, limit=seconds, log=log)
    print(log.read_text(errors="replace"))
    return harness.exit_code([row])


def swaps(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Climb the ladder with single ops, and with single options left out."""
    return climb(c, device, seconds, ("fused", *SWAPS, "all", *WITHOUT))


def texts(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Time our sample and transformers' generate."""
    limit = min(c.process_limit, seconds / len(generate.NAMES))
    config = generate.GenerateConfig(size=c.size, device=str(device), repetitions=1, limit=limit, file=c.rows)
    return harness.exit_code(generate.compare(config))


def sanitize(c: GpuConfig, device: torch.device, seconds: float) -> int:
    """Ask compute-sanitizer, a row for each tool."""
    rows = sanitizer.check_all(seconds, c.out)
    for row in rows:
        write(c, "sanitize", row)
        print(row)
    return harness.exit_code(rows)


class Stage(NamedTuple):
    """A stage: a function that returns nonzero if something was wrong, and its share of a budget."""

    run: Callable[[GpuConfig, torch.device, float], int]
    share: int


STAGES = {
    "environment": Stage(environment, 1),
    "kernels": Stage(kernel_times, 4),
    "ladder": Stage(climb, 8),
    "profile": Stage(profiles, 2),
    "peers": Stage(step_peers, 8),
    "tests": Stage(gpu_tests, 8),
    "tune": Stage(tuning, 14),
    "sizes": Stage(sizes, 12),
    "options": Stage(curves, 20),
    "swaps": Stage(swaps, 12),
    "generate": Stage(texts, 4),
    "sanitize": Stage(sanitize, 12),
}
DEFAULT = ("environment", "kernels", "ladder", "profile", "peers")
