"""Fuzz the readers and the command lines: `python -m tests.long.fuzz [--seconds 60] [--only TEXT]`.

A case is a target and a number: `--only TARGET --seed N` repeats it. Each case must be read, or refused with one of our
errors; it must write nothing, run no code from the file, take no more address space than `BOUND` and a few times the
file's size, and end within `SECONDS`. Cases run in forked processes, so a crash is one finding and does not end the
program. With --record, the counts are appended to benchmarks/results.
"""

import faulthandler
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import flags, harness
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.machine import versions
from tests.tools import damage
from tests.tools.bounded import WAIT, clear, run, run_case
from tests.tools.targets import TARGETS

AT_ONCE = 200  # cases per process


def apart(name: str, seeds: range) -> tuple[Counter, dict[str, int], int]:
    """Run cases in a new process. Return the count of each outcome, finding -> seed, and the number of cases run."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w", buffering=1) as out, tempfile.TemporaryDirectory(dir=shm()) as work:
            for seed in seeds:
                faulthandler.dump_traceback_later(2 * WAIT, exit=True)  # also where Python's alarm is not handled
                out.write(json.dumps([seed, "begun", ""]) + "\n")
                out.write(json.dumps([seed, *run(TARGETS[name], seed, Path(work))]) + "\n")
        os._exit(0)
    os.close(writer)
    counts, findings, last, n = Counter(), {}, None, 0
    with os.fdopen(reader) as lines:
        for line in lines:
            seed, outcome, what = json.loads(line)
            last = (seed, outcome)
            if outcome != "begun":
                counts[outcome] += 1
                n += 1
            if outcome == "finding":
                findings.setdefault(what, seed)
    _, status = os.waitpid(child, 0)
    if status and last:
        counts["finding"] += 1
        findings[f"the process ended with status {status}"] = last[0]
        n += 1
    return counts, findings, n


def check_sound(name: str, work: Path) -> None:
    """Assert that the valid files are read; else all damage would be refused for one reason. Also imports modules."""
    target = TARGETS[name]
    if name != "command line":
        damage.write(target.sound, work / "first")
        with suppress(UserError):
            target.call(work / "first")
        clear(work)
        outcome, why = run_case(target, target.sound, work)
        assert outcome == ("refused" if "with code" in name else "read"), f"{name}: {why}"


def shm() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def fuzz(names: list[str], seconds: float, first: int) -> dict[str, dict]:
    """Fuzz all targets for equal times. Return target -> counts and findings."""
    found = {name: {"cases": 0, "outcomes": Counter(), "findings": {}, "seconds": 0.0} for name in names}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = min(names, key=lambda name: found[name]["seconds"])
        start, row = time.monotonic(), found[name]
        counts, findings, n = apart(name, range(first + row["cases"], first + row["cases"] + AT_ONCE))
        row["cases"] += n
        row["outcomes"] += counts
        row["seconds"] += time.monotonic() - start
        for what, seed in findings.items():
            if what not in row["findings"]:
                row["findings"][what] = seed
                print(f"{name}, seed {seed}: {what}", flush=True)
    return found


@dataclass(frozen=True, kw_only=True)
class FuzzConfig:
    """Damage valid files of every format, and read them."""

    seconds: float = 60.0
    """How long to run."""
    only: str = ""
    """Run only targets whose name contains this."""
    first: int = 0
    """Number of the first case of each target."""
    seed: int | None = None
    """Run this case only."""
    record: bool = False
    """Append the counts to benchmarks/results."""


def main(argv: Sequence[str]) -> int:
    o = flags.parse(FuzzConfig, argv, "tests.long.fuzz")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    names = [name for name in TARGETS if o.only in name]
    if o.seed is not None:
        with tempfile.TemporaryDirectory() as work:
            for name in names:
                print(name, *run(TARGETS[name], o.seed, Path(work)), sep=": ")
        return 0
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            check_sound(name, Path(work))
    record = versions.record()
    found = fuzz(names, o.seconds, o.first)
    for name, row in found.items():
        counts = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(row["outcomes"].items()))
        print(f"{name:22} {row['cases']:>8,} cases in {row['seconds']:.0f} s: {counts}")
        if o.record:
            outcomes = {outcome: row["outcomes"][outcome] for outcome in ("read", "refused", "finding")}
            row = {"suite": "fuzz", "target": name, **row, "outcomes": outcomes, "first": o.first}
            harness.append_row(harness.results_file("fuzz"), row | {"machine": record})
    return 1 if any(row["findings"] for row in found.values()) else 0


if __name__ == "__main__":
    run_main(main)
