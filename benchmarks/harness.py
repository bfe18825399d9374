"""How benchmarks time, record, and run measurements in processes of their own.

A measurement has its own process because memory, allocator settings and compilers' caches belong to a process, and so
that a crash or a hang costs one row. `apart(function, settings)` starts `python -m benchmarks.harness`, which calls the
function with its settings, a dataclass that travels as JSON, and hands back the row that it returns.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import pkgutil
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from gpt2fast.command import run_main
from gpt2fast.machine import versions
from gpt2fast.machine.device import synchronize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHORTEST = 15.0  # seconds: a process that would get less is not started, since importing torch takes a third of them
COPY_BYTES, MATMUL = 2**32, (8192, 8192, 8192)  # what a GPU's ceilings are measured by

Settings = TypeVar("Settings")
Item = TypeVar("Item")


def time_calls(fn: Callable[[], object], device: torch.device, n: int, max_seconds: float) -> list[float]:
    """Return the seconds of each of up to `n` calls: fewer if they would take longer than `max_seconds`, at least 3.

    On CUDA they are timed by events: as in training, the host waits only before the first call and after the last.
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
    """Measure a copy of `size` bytes on the device, in bytes read plus bytes written per second."""
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    times = time_calls(lambda: target.copy_(source), device, n, 5.0)
    return {"bytes": 2 * size, "gb_per_s": spread([2 * size / t / 1e9 for t in times])}


def matmul_rate(device: torch.device, M: int, N: int, K: int, n: int = 20) -> dict:
    """Measure the TFLOP/s of a bf16 product of random data; zeros would run faster."""
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    w = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        torch.nn.functional.linear(x, w)
    times = time_calls(lambda: torch.nn.functional.linear(x, w), device, n, 5.0)
    return {"shape": [M, N, K], "tflops": spread([2 * M * N * K / t / 1e12 for t in times])}


def yardsticks(device: torch.device) -> dict[str, float]:
    """Measure what the device copies and multiplies: {"gb_per_s", "tflops"}."""
    cuda = device.type == "cuda"
    copy = copy_bandwidth(device, COPY_BYTES if cuda else 2**26)
    matmul = matmul_rate(device, *(MATMUL if cuda else (1024, 1024, 1024)))
    return {"gb_per_s": copy["gb_per_s"]["median"], "tflops": matmul["tflops"]["median"]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and the 20th and 80th percentiles."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[1], "p80": cuts[7]}


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes: of torch's allocator on CUDA, of the whole process since its start elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def results_file(suite: str, folder: Path = RESULTS) -> Path:
    """Return <folder>/<gpu or cpu>/<date>_<commit7>_<suite>.jsonl."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    commit = (versions.record()["commit"] or "unknown")[:7]
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / name / f"{datetime.date.today()}_{commit}_{suite}.jsonl"


def append_row(path: Path, row: dict) -> None:
    """Append a line of JSON, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_apart(
    module: str, *args: object, limit: float, log: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> dict:
    """Run `python -m module args` in a process group of its own, and append its output to `log`.

    Return {"status": "ok", "failed" or "timeout", "seconds", "tail": the end of the log unless ok}, whatever the
    program does. After `limit` seconds the whole group is killed.
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
    """Kill the group, after a normal end too: a compiler's workers may have outlived their parent."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def apart(
    function: Callable[[Settings], dict | None],
    settings: Settings,
    *,
    limit: float,
    log: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict:
    """Call function(settings) in a process of its own, and return its row and "seconds".

    If the process ends without having returned, return the row of `run_apart`. The function stands at the top of its
    module, and its one parameter is annotated with the class of `settings`.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, returned = Path(folder) / "settings.json", Path(folder) / "row.json"
        given.write_text(json.dumps(asdict(settings), default=str))  # type: ignore[call-overload]  # a dataclass
        row = run_apart(
            "benchmarks.harness", module_of(function), function.__name__, given, returned,
            limit=limit, log=log or Path(folder) / "log", environment=environment,
        )  # fmt: skip
        if not returned.exists():
            return row
        return json.loads(returned.read_text()) | {"seconds": row["seconds"]}


def each_apart(
    function: Callable[[Settings], dict | None],
    jobs: Sequence[Settings],
    *,
    limit: float,
    end: float = math.inf,
    at_once: int = 1,
) -> Iterator[dict]:
    """Yield the row of `apart` for each job, in their order; `at_once` of them run at a time.

    A job that would get less than SHORTEST seconds until `end`, a time of time.monotonic(), is a row that says so.
    """

    def run(job: Settings) -> dict:
        left = min(limit, end - time.monotonic())
        if left < SHORTEST:
            return {"status": "skipped", "why": "no time is left: raise --budget or --limit"}
        return apart(function, job, limit=left)

    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(run, jobs)


def work_through(
    function: Callable[[Settings], dict | None],
    items: Sequence[Item],
    job: Callable[[Sequence[Item], Path], Settings],
    *,
    end: float = math.inf,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[Item, dict]]:
    """Yield each item with its row, from few processes: function(job(items, file)) appends a row for each to the file.

    If a process dies, the item it had come to gets the row of `run_apart`, and another process takes those that are
    left. Items that no process has come to at `end` are not yielded.
    """
    left = list(items)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        while left and time.monotonic() < end:
            file.write_text("")
            died = apart(function, job(left, file), limit=end - time.monotonic(), environment=environment)
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            yield from zip(left, rows)
            left = left[len(rows) :]
            if left and time.monotonic() < end:
                yield left.pop(0), died


def exit_code(rows: Sequence[dict]) -> int:
    """Return 0 if every row is ok or skipped, else 1."""
    return int(any(row["status"] not in ("ok", "skipped") for row in rows))


def module_of(function: Callable) -> str:
    """Return the name under which another process can import the function's module."""
    if function.__module__ != "__main__":
        return function.__module__
    spec = sys.modules["__main__"].__spec__
    assert spec, "started by python -m"
    return spec.name


def restore(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Make the dataclass `kind` of what JSON left of its fields; they may be paths, tuples and dataclasses."""
    hints = get_type_hints(kind)

    def field(hint: Any, value: Any) -> Any:
        if is_dataclass(hint):
            return restore(hint, value)  # type: ignore[arg-type]
        if isinstance(value, list):
            return tuple(tuple(x) if isinstance(x, list) else x for x in value)
        return Path(value) if value is not None and Path in (hint, *get_args(hint)) else value

    return kind(**{name: field(hints[name], value) for name, value in values.items()})


def main(argv: Sequence[str]) -> None:
    """Run what `apart` asked for: a module, a function of it, the file of its settings, the file for its row."""
    module, name, given, returned = argv
    function = pkgutil.resolve_name(f"{module}:{name}")
    [kind] = [hint for parameter, hint in get_type_hints(function).items() if parameter != "return"]
    row = function(restore(kind, json.loads(Path(given).read_text())))
    Path(returned).write_text(json.dumps({"status": "ok"} | (row or {})))


if __name__ == "__main__":
    run_main(main)
