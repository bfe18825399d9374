"""Launch settings against others: `python -m benchmarks.tune [--kernel NAME ...]`.

gpt2fast.kernels.launch holds pure functions of shape, dtype and device, argued from bytes and registers. Here each is
replaced by one that returns something else, its kernel's results are judged against fp32 arithmetic as in
benchmarks/kernels.py (at most twice as wrong as with the setting that stands), and what is right is timed, L2 flushed,
at GPT-2 124M's shapes. The last lines say what of launch.py would change.

Most of the time is compiling. So first several processes run each candidate once, on few tokens, which leaves it in
Triton's cache on the disk; what does not compile, crashes or hangs there is not tried here.
"""

import argparse
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import harness, kernels
from benchmarks.settings import Kernel, PerProcessor, cases, ready, tunables
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.machine import versions
from gpt2fast.machine.device import device_name

UNUSED = "not used at this shape on this device"
MATTERS = 0.99  # of the time with the setting that stands: less is worth a change
COMPILE_TOKENS, COMPILE_SECONDS = 8192, 150.0
JOBS = 12  # processes that compile: each holds what 8192 tokens need, 2 GB at most


def replaced(kernel: Kernel, value: object, seen: list) -> object:
    """What takes the place of `kernel.name` in launch. value None: what stands there, and `seen` gets what that is."""
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
    """One setting: its row, and what the kernel computed with it. `check` says what is wrong with results, or "ok"."""
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
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Tried(row | {"settings": repr(value), "status": why}, [])


def judge(truth: list[Tensor], allowed: list[float], results: list[Tensor]) -> str:
    return kernels.verdict(kernels.errors(results, truth), allowed)


def tune(kernel: Kernel, case: kernels.Case, bad: dict, device: torch.device, end: float) -> Iterator[dict]:
    """A row for each setting, that which stands first. `bad`: what was found to fail, and why."""
    standing = attempt(kernel, case, None, device, lambda results: "ok")
    yield standing.row
    if standing.row["status"] != "ok":
        return
    truth, allowed = standing.results, [0.0] * len(standing.results)
    if case.fn is not None:
        torch.manual_seed(0)
        truth = kernels.once(case.fn, [x.float() for x in case.inputs(device)], case.others, backward=True)
        allowed = kernels.errors(standing.results, truth)
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
    mark = "  the default" * row["default"] + "  the best" * bool(row.get("best"))
    ms = f"{row['ms']:9.4f} ms{mark}" if row["status"] == "ok" else row["status"][:100]
    return f"{row['kernel']:<34}{row['settings']:<62}{ms}"


def changes(rows: Sequence[dict]) -> list[str]:
    """The lines of launch.py that would change, one for each kernel whose best is faster by more than noise."""
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


def compile_all(chosen: Sequence[Kernel], options: argparse.Namespace) -> dict[tuple[str, str], str]:
    """Run each setting once, elsewhere. {(kernel, settings): why} of those that failed."""
    wanted = [(kernel.title, repr(value)) for kernel in chosen for value in kernel.values]
    shares = [wanted[i :: options.jobs] for i in range(options.jobs)]
    end = time.monotonic() + min(COMPILE_SECONDS, options.budget / 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda i: compile_share(shares[i], options, end, Path(folder) / str(i)), range(options.jobs))
        return {key: why for part in found for key, why in part.items()}


def compile_share(
    share: list[tuple[str, str]], options: argparse.Namespace, end: float, folder: Path
) -> dict[tuple[str, str], str]:
    """In a process, and in another one where that was the end of it: whatever it was at is what failed."""
    folder.mkdir()
    bad: dict[tuple[str, str], str] = {}
    left, out = list(share), folder / "done.jsonl"
    while left:
        out.write_text("")
        (folder / "left.json").write_text(json.dumps(left))
        arguments = ["--size", options.size, "--seq-len", options.seq_len, "--compile", folder / "left.json", out]
        row = harness.run_apart("benchmarks.tune", *arguments, limit=end - time.monotonic(), log=folder / "log")
        done = [json.loads(line) for line in out.read_text().splitlines()]
        bad |= {(one["kernel"], one["settings"]): one["status"] for one in done if one["status"] != "ok"}
        left = left[len(done) :]
        if left and time.monotonic() < end:
            bad[left.pop(0)] = f"the process that tried it: {row['status']}"
        elif left:
            break  # these compile when they are timed
    return bad


def compile_here(wanted: Sequence[Sequence[str]], out: Path, device: torch.device, options: argparse.Namespace) -> None:
    """What such a process does."""
    found, known = tunables(options.size), cases(COMPILE_TOKENS, options.seq_len, options.size, device)
    for title, settings in wanted:
        kernel = found[title]
        value = next(value for value in kernel.values if repr(value) == settings)
        with mock.patch.object(kernels, "time_ms", lambda call, device: call() and {"median": 0.0}):
            row = attempt(kernel, known[kernel.op], value, device, lambda results: "ok").row
        torch.cuda.synchronize(device)
        harness.append_row(out, row | {"kernel": title, "settings": settings})


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    p.add_argument(
        "--kernel", nargs="+", metavar="NAME", help="only these functions of launch, or kernels of these ops"
    )
    p.add_argument("--size", choices=kernels.SIZES, default="gpt2")
    p.add_argument("--tokens", type=int, default=65536)
    p.add_argument("--seq-len", type=int, default=1024, help="T of attention")
    p.add_argument("--budget", type=float, default=500.0, help="seconds; no setting is timed after them")
    p.add_argument("--jobs", type=int, default=JOBS, help="processes that compile beforehand; 0: none")
    p.add_argument("--file", type=Path, help="append the rows to this file instead of a new one of results")
    p.add_argument("--compile", nargs=2, type=Path, help=argparse.SUPPRESS)  # what such a process gets
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError(f"benchmarks.tune needs a CUDA GPU, and torch {torch.__version__} sees none")
    device = torch.device("cuda")
    if options.compile:
        wanted, out = options.compile
        compile_here(json.loads(wanted.read_text()), out, device, options)
        return 0
    found = tunables(options.size)
    wanted = options.kernel or []
    if unknown := [name for name in wanted if not any(name in (k.name, k.op) for k in found.values())]:
        raise UserError(f"--kernel {unknown[0]}: there are {', '.join(sorted({k.name for k in found.values()}))}")
    chosen = [k for k in found.values() if not wanted or {k.name, k.op} & set(wanted)]
    return run(chosen, options, device)


def run(chosen: Sequence[Kernel], options: argparse.Namespace, device: torch.device) -> int:
    """Tune these kernels; 1 if some default does not run."""
    path = options.file or harness.results_file("tune")
    end = time.monotonic() + options.budget
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # the truth is exact
    print(f"{device_name(device)}: {sum(len(k.values) for k in chosen)} settings; rows in {path}", flush=True)
    bad = compile_all(chosen, options) if options.jobs else {}
    print(f"compiled; {len(bad)} fail", flush=True)
    known, record, rows = cases(options.tokens, options.seq_len, options.size, device), versions.record(), []
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


if __name__ == "__main__":
    run_main(main)
