"""How anything here is timed, recorded, and run apart, so that numbers can be compared and a crash loses none."""

import contextlib
import datetime
import itertools
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from gpt2fast.machine import versions
from gpt2fast.machine.device import synchronize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def time_calls(fn: Callable[[], object], device: torch.device, n: int, max_seconds: float) -> list[float]:
    """Seconds of each of up to `n` calls, fewer if they would take longer than `max_seconds`, but at least 3.

    On CUDA by events, with the host waiting only before the first call and after the last, as in training.
    """
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    estimate = time.perf_counter() - start
    n = max(3, min(n, int(max_seconds / max(estimate, 1e-9))))
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            fn()
            event.record()
        synchronize(device)
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        fn()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def copy_bandwidth(device: torch.device, size: int, n: int = 20) -> dict:
    """Bytes read plus bytes written per second of a copy of `size` bytes on the device."""
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    times = time_calls(lambda: target.copy_(source), device, n, 5.0)
    return {"bytes": 2 * size, "gb_per_s": spread([2 * size / t / 1e9 for t in times])}


def matmul_rate(device: torch.device, M: int, N: int, K: int, n: int = 20) -> dict:
    """TFLOP/s of a bf16 product of random data; zeros would run faster."""
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    w = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        torch.nn.functional.linear(x, w)
    times = time_calls(lambda: torch.nn.functional.linear(x, w), device, n, 5.0)
    return {"shape": [M, N, K], "tflops": spread([2 * M * N * K / t / 1e12 for t in times])}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[1], "p80": cuts[7]}


def peak_memory(device: torch.device) -> int:
    """Bytes: of torch's allocator on CUDA, of the whole process elsewhere, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def results_file(suite: str, folder: Path = RESULTS) -> Path:
    """<folder>/<gpu or cpu>/<date>_<commit7>_<suite>.jsonl"""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    commit = (versions.record()["commit"] or "unknown")[:7]
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / name / f"{datetime.date.today()}_{commit}_{suite}.jsonl"


def append_row(path: Path, row: dict) -> None:
    """One line of JSON, on the disk before the next measurement begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_apart(
    module: str, *args: object, limit: float, log: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> dict:
    """`python -m module args` in a process group of its own, its output into `log`.

    {"status": "ok", "failed" or "timeout", "seconds", "tail": last lines of the log unless ok}. Never raises for what
    the program does; past `limit` seconds, the whole group is killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    everything = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=everything,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(timeout=max(1.0, limit)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            _kill_group(process)
    row = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "ok":
        row["tail"] = log.read_text(errors="replace")[-1500:]
    return row


def _kill_group(process: subprocess.Popen) -> None:
    """Also after a normal end: a compiler's workers may have outlived their parent."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
