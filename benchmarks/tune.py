"""Try other launch settings: `python -m benchmarks.tune [--kernel NAME ...]`.

gpt2fast.kernels.launch holds pure functions of shape, dtype and device, argued from bytes and registers. Here each is
replaced by one that returns something else. The kernel's results are judged against fp32 arithmetic as in
benchmarks/kernels.py (an error at most twice that with the current setting), and what is right is timed, L2 flushed, at
GPT-2 124M's shapes. The last lines say which lines of launch.py would change.

Most of the time goes into compiling. So several processes first run each candidate once, on few tokens, which leaves it
in Triton's cache on the disk; a candidate that does not compile, crashes or hangs there is not tried here.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import flags, harness, kernels
from benchmarks.settings import Kernel, PerProcessor, cases, ready, tunables
from gpt2fast import measure
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.errors import describe_error as describe_error
from gpt2fast.machine import versions
from gpt2fast.machine.device import device_name

UNUSED = "not used at this shape on this device"
MATTERS = 0.99  # a time below this share of the current setting's is worth a change
COMPILE_TOKENS, COMPILE_SECONDS = 8192, 150.0


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Try other launch settings."""

    kernel: tuple[str, ...] = ()
    """Functions of launch, or ops whose kernels are meant. None named: all."""
    size: flags.Size = "gpt2"
    """Model whose shapes are taken."""
    tokens: int = 65536
    """Rows, and B * T of attention."""
    seq_len: int = 1024
    """T of attention."""
    budget: float = 500.0
    """Seconds; no setting is timed after them."""
    jobs: int = 12
    """Processes that compile beforehand, each with up to 2 GB on the device; 0: none."""
    file: Path | None = None
    """Append the rows to this file instead of a new one among the results."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process that compiles gets: kernels with their settings, and the file for its rows."""

    wanted: tuple[tuple[str, str], ...]
    out: Path
    size: str
    seq_len: int
    device: str = "cuda"


def replaced(kernel: Kernel, value: object, seen: list) -> object:
    """Return what replaces `kernel.name` in launch; value None keeps the current one, which is appended to `seen`."""
    from gpt2fast.kernels import launch

    original = getattr(launch, kernel.name)
    if not callable(original):
        seen.append(original)
        return original if value is None else value
    signature = inspect.signature(original)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if not kernel.when.items() <= bound.arguments.items():
            return original(*args, **kwargs)
        standing = original(*args, **kwargs)
        counts = kernel.name == "persistent"
        seen.append(PerProcessor(bound.arguments["per_processor"]) if counts else standing)
        if isinstance(value, PerProcessor):
            return original(*args[:2], per_processor=value.n)
        return standing if value is None else value

    return function


@dataclass(frozen=True)
class Tried:
    row: dict
    results: list[Tensor]


def attempt(
    kernel: Kernel, case: kernels.Case, value: object, device: torch.device, check: Callable[[list[Tensor]], str]
) -> Tried:
    """Try one setting: return its row and the kernel's results. `check` says what is wrong with these, or "ok"."""
    from gpt2fast.kernels import launch

    seen: list = []
    row = {"kernel": kernel.title, "op": kernel.op, "direction": kernel.direction, "default": value is None}
    with mock.patch.object(launch, kernel.name, replaced(kernel, value, seen)):
        try:
            results, call = ready(kernel, case, device)
            status = check(results) if seen else UNUSED
            row |= {"settings": repr(seen[-1] if value is None and seen else value), "status": status}
            if row["status"] == "ok":
                row["ms"] = kernels.time_ms(call, device)["median"]
            return Tried(row, results)
        except Exception as error:  # whatever it is, the other settings are worth having
            return Tried(row | {"settings": repr(value), "status": describe_error(error)}, [])


def judge(truth: list[Tensor], allowed: list[float], results: list[Tensor]) -> str:
    """Return "ok", or what is wrong with these results; `allowed` are the current setting's errors."""
    return kernels.verdict(results, measure.errors(results, truth), allowed, "the current setting's")


def tune(kernel: Kernel, case: kernels.Case, bad: dict, device: torch.device, end: float) -> Iterator[dict]:
    """Yield a row for each setting, the current one first. `bad`: settings that are known to fail, and why."""
    standing = attempt(kernel, case, None, device, lambda results: "ok")
    yield standing.row
    if standing.row["status"] != "ok":
        return
    truth, allowed = standing.results, [0.0] * len(standing.results)
    if case.fn is not None:
        torch.manual_seed(0)
        truth = kernels.once(case.fn, [x.float() for x in case.inputs(device)], case.others, backward=True)
        allowed = measure.errors(standing.results, truth)
    for value in kernel.values:
        if repr(value) == standing.row["settings"]:
            continue
        if why := bad.get((kernel.title, repr(value))):
            yield {**standing.row, "default": False, "settings": repr(value), "status": why, "ms": None}
        elif time.monotonic() > end:
            yield {**standing.row, "default": False, "settings": repr(value), "status": "no time left", "ms": None}
        else:
            yield attempt(kernel, case, value, device, partial(judge, truth, allowed)).row


def describe(row: dict) -> str:
    """Return a line of the table."""
    mark = "  the default" * row["default"] + "  the best" * bool(row.get("best"))
    ms = f"{row['ms']:9.4f} ms{mark}" if row["status"] == "ok" else row["status"][:100]
    return f"{row['kernel']:<34}{row['settings']:<62}{ms}"


def changes(rows: Sequence[dict]) -> list[str]:
    """Return the lines of launch.py that would change: kernels whose best setting is faster by more than noise."""
    from gpt2fast.kernels import launch

    lines = Path(launch.__file__).read_text().splitlines()
    found = []
    for title in dict.fromkeys(row["kernel"] for row in rows):
        of = [row for row in rows if row["kernel"] == title]
        best, standing = next((r for r in of if r.get("best")), None), next(r for r in of if r["default"])
        if best and best["ms"] < MATTERS * standing["ms"]:
            name = title.split()[0]
            number = next(i for i, line in enumerate(lines, 1) if line.startswith((f"def {name}(", f"{name} =")))
            gain = f"{best['ms']:.4f} ms, {standing['ms']:.4f} before"
            found.append(f"kernels/launch.py:{number} {title}: {standing['settings']} -> {best['settings']} ({gain})")
    return found


def compile_all(chosen: Sequence[Kernel], c: TuneConfig) -> dict[tuple[str, str], str]:
    """Run each setting once, in c.jobs processes, and return {(kernel, settings): why} of those that failed."""
    wanted = [(kernel.title, repr(value)) for kernel in chosen for value in kernel.values]
    end = time.monotonic() + min(COMPILE_SECONDS, c.budget / 2)

    def share(i: int) -> list[tuple[tuple[str, str], dict]]:  # what no process came to compiles when it is timed
        def job(left: Sequence[tuple[str, str]], out: Path) -> Job:
            return Job(wanted=tuple(left), out=out, size=c.size, seq_len=c.seq_len)

        return list(harness.work_through(compile_here, wanted[i :: c.jobs], job, end=end))

    with ThreadPoolExecutor(c.jobs) as pool:
        found = [each for part in pool.map(share, range(c.jobs)) for each in part]
    died = {"failed", "timeout"}
    return {
        key: f"the process that tried it: {row['status']}" if row["status"] in died else row["status"]
        for key, row in found
        if row["status"] != "ok"
    }


def compile_here(job: Job) -> None:
    """Run each setting of a job once, and append a row for each."""
    device = torch.device(job.device)
    found, known = tunables(job.size), cases(COMPILE_TOKENS, job.seq_len, job.size, device)
    for title, settings in job.wanted:
        kernel = found[title]
        value = next(value for value in kernel.values if repr(value) == settings)
        with mock.patch.object(kernels, "time_ms", lambda call, device: call() and {"median": 0.0}):
            row = attempt(kernel, known[kernel.op], value, device, lambda results: "ok").row
        torch.cuda.synchronize(device)
        harness.append_row(job.out, row | {"kernel": title, "settings": settings})


def run(c: TuneConfig) -> int:
    """Tune the kernels that were asked for, and return 1 if the current setting of one does not run, else 0."""
    if not torch.cuda.is_available():
        raise UserError(f"benchmarks.tune needs a CUDA GPU, and torch {torch.__version__} sees none")
    check_at_least(c, tokens=1, seq_len=1, budget=0, jobs=0)
    found = tunables(c.size)
    if unknown := [name for name in c.kernel if not any(name in (k.name, k.op) for k in found.values())]:
        raise UserError(f"--kernel {unknown[0]}: there are {', '.join(sorted({k.name for k in found.values()}))}")
    chosen = [k for k in found.values() if not c.kernel or {k.name, k.op} & set(c.kernel)]
    return tune_all(chosen, c, torch.device("cuda"))


def tune_all(chosen: Sequence[Kernel], c: TuneConfig, device: torch.device) -> int:
    """Tune these kernels, and return 1 if the current setting of one does not run, else 0."""
    path = c.file or harness.results_file("tune")
    end = time.monotonic() + c.budget
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # the truth is exact
    print(f"{device_name(device)}: {sum(len(k.values) for k in chosen)} settings; rows in {path}", flush=True)
    bad = compile_all(chosen, c) if c.jobs else {}
    print(f"compiled; {len(bad)} fail", flush=True)
    known, record, rows = cases(c.tokens, c.seq_len, c.size, device), versions.record(), []
    for kernel in chosen:
        of = list(tune(kernel, known[kernel.op], bad, device, end))
        ran = [row for row in of if row["status"] == "ok"]
        best = min(ran, key=lambda row: row["ms"], default=None)
        for row in of:
            row["best"] = row is best
            harness.append_row(path, {"suite": "tune", **row, "shape": known[kernel.op].shape, "machine": record})
            print(describe(row), flush=True)
        rows += of
    print(*(changes(rows) or ["nothing in launch.py would change"]), sep="\n")
    return int(any(row["default"] and row["status"] not in ("ok", UNUSED) for row in rows))


def main(argv: Sequence[str]) -> int:
    return run(flags.parse(TuneConfig, argv, "benchmarks.tune"))


if __name__ == "__main__":
    run_main(main)
