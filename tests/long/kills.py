"""The cost of kill -9, measured: `python -m tests.long.kills` kills a run many times and resumes it each time.

The moments are random, and of five kinds: before the first step, within or between steps, while a checkpoint is written
(twice as often), after its renaming, and while the one before it is deleted. What each kill interrupted is inferred
from the folder that it left. Each time at most the steps between two checkpoints may be lost, and the newest checkpoint
must be complete, with weights and moments that equal, bit for bit, those of an uninterrupted run at that step. So the
run continues like that one, and at the end their weights, moments and losses must be the same.
"""

import hashlib
import json
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from benchmarks import flags, harness
from gpt2fast.command import run_main
from gpt2fast.errors import RunError, check_at_least
from gpt2fast.machine import versions
from gpt2fast.training import run
from gpt2fast.weights import checkpoint
from tests.long import process
from tests.tools import tiny
from tests.tools.programs import Program

EVERY = 3  # steps between checkpoints, of which the newest one is kept
PATIENCE = 900.0  # seconds that only a hang takes
# what must appear in the folder of checkpoints, and the most seconds to wait after that
KINDS: dict[str, tuple[str | None, float]] = {
    "writing": (r"\..*\.tmp", 0.02),
    "renaming": (r"step_\d+", 0.0),
    "deleting": (r"\..*\.deleted", 0.0),
}
KINDS |= {"starting": (None, 0.6), "stepping": (r"", 0.3)}  # after the process's start; after metrics.jsonl's opening
TURNS = "starting", "writing", "renaming", "stepping", "writing", "deleting"
DURING_A_CHECKPOINT = {"writing", "renamed", "deleting"}
FILES = "model.safetensors", "optimizer.safetensors"
FLAGS = (*tiny.FLAGS, "--total-batch", "64", "--compile", "off", "--deterministic", "--val-every", "0")


def entries(checkpoints: Path) -> set[tuple[str, int]]:
    """Return the name and inode of each entry: a folder that was made again under the same name is a different one."""
    found = set()
    for path in checkpoints.iterdir():
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # renamed or deleted in the meantime
            continue
    return found


def wait(victim: Program | subprocess.Popen, folder: Path, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        if victim.poll() is not None or time.monotonic() > end:
            raise RunError(f"the run ended by itself, or did nothing for {PATIENCE:.0f} s: {process.printed(folder)}")
        time.sleep(0.0001)


def phase(before: set, after: set, metrics_before: int, metrics_after: int) -> str:
    """Return what a process was doing when it was killed, from the checkpoints' folder and metrics.jsonl's inode."""
    fresh = [name for name, _ in after - before]
    for name in ("deleting", "writing"):
        if any(re.fullmatch(KINDS[name][0] or "", each) for each in fresh):
            return name
    complete = [name for name, _ in after if re.fullmatch(KINDS["renaming"][0] or "", name)]
    if len(complete) > 1 and any(name in complete for name in fresh):
        return "renamed"
    return "starting" if metrics_before == metrics_after else "stepping"


def kill(folder: Path, words: Sequence[str], kind: str, delay: float) -> dict:
    """Resume the run, kill it at that moment, and return what that interrupted and what it cost."""
    out = folder / "out" / "killed"
    checkpoints, metrics = out / "checkpoints", out / "metrics.jsonl"
    before, metrics_before = entries(checkpoints), metrics.stat().st_ino
    resumed, _ = newest(checkpoints)
    start = time.monotonic()
    victim = process.start(folder, *words, "--resume")
    pattern, _ = KINDS[kind]
    try:
        if pattern is not None:
            # what an earlier kill left is removed before the first step, and must not be mistaken for this one's
            wait(victim, folder, lambda: metrics.stat().st_ino != metrics_before)
        if pattern:
            old = entries(checkpoints)
            wait(victim, folder, lambda: any(re.fullmatch(pattern, name) for name, _ in entries(checkpoints) - old))
        time.sleep(delay)
    finally:
        with suppress(ProcessLookupError):
            victim.send_signal(signal.SIGKILL)
        victim.wait()
    after = time.monotonic() - start
    interrupted = phase(before, entries(checkpoints), metrics_before, metrics.stat().st_ino)
    step, path = newest(checkpoints)
    bits = digest(path)
    reached = max((row["step"] for row in run.read_metrics(metrics)), default=0)
    if victim.returncode != -9:
        raise RunError(f"the run ended with {victim.returncode} before it was killed: {process.printed(folder)}")
    return {
        "kind": kind, "delay_ms": round(delay * 1e3, 2), "seconds": round(after, 3), "phase": interrupted,
        "from": resumed, "reached": reached, "newest": step, "lost": reached - step,
        "bits": bits,
    }  # fmt: skip


def newest(checkpoints: Path) -> tuple[int, Path]:
    """Return step and folder of the newest checkpoint."""
    return checkpoint.list_checkpoints(checkpoints)[-1]


def digest(path: Path) -> str:
    """Return a hash of a checkpoint's weights and moments. UserError if the checkpoint is not complete."""
    checkpoint.read_state(path)
    return hashlib.sha256(b"".join((path / name).read_bytes() for name in FILES)).hexdigest()[:16]


def whole_run(folder: Path, *words: str) -> None:
    whole = process.start(folder, *words)
    whole.wait()
    if whole.returncode:
        raise RunError(f"a run ended with {whole.returncode}: {process.printed(folder)}")


def same(folder: Path, rows: Sequence[dict]) -> list[str]:
    """Return what differs between the killed run and the uninterrupted one, after each kill and at the end."""
    kept = {step: digest(path) for step, path in checkpoint.list_checkpoints(folder / "out/straight/checkpoints")}
    different = [f"step {row['newest']} after kill {row['kill']}" for row in rows if row["bits"] != kept[row["newest"]]]
    killed, straight = (folder / "out" / name for name in ("killed", "straight"))
    paths = [newest(out / "checkpoints")[1] for out in (killed, straight)]
    different += [name for name in FILES if len({(path / name).read_bytes() for path in paths}) > 1]
    states = [{name: checkpoint.read_state(path)[name] for name in ("step", "position")} for path in paths]
    different += [name for name in states[0] if states[0][name] != states[1][name]]
    losses = [
        [
            {name: row[name] for name in ("step", "loss", "lr", "grad_norm")}
            for row in run.read_metrics(out / "metrics.jsonl")
        ]
        for out in (killed, straight)
    ]
    return different + (["metrics"] if json.dumps(losses[0]) != json.dumps(losses[1]) else [])


def kills(folder: Path, number: int, seed: int, say: Callable[[dict], None]) -> dict:
    """Kill a run in `folder` `number` times, let it end, and compare it with an uninterrupted one.

    `say` receives a row for each kill.
    """
    moments = random.Random(seed)
    tiny.write_data(folder / "data", n=3000)
    words = [*FLAGS, "--steps", "100000", "--checkpoint-every", str(EVERY), "--keep", "1", "--run", "killed"]
    whole_run(folder, *words, "--stop-at", str(EVERY))
    rows = []
    for n, kind in enumerate(islice(cycle(TURNS), number), 1):
        rows.append({"kill": n} | kill(folder, words, kind, moments.uniform(0, KINDS[kind][1])))
        say(rows[-1])
    end = str(max(row["reached"] for row in rows) + 2)
    whole_run(folder, *words, "--resume", "--stop-at", end)
    whole_run(folder, *words, "--run", "straight", "--keep", end, "--stop-at", end)
    phases = Counter(row["phase"] for row in rows)
    return {
        "kills": number, "seed": seed, "checkpoint_every": EVERY, "steps": int(end), "phases": dict(phases),
        "during_a_checkpoint": sum(phases[name] for name in DURING_A_CHECKPOINT),
        "most_lost": max(row["lost"] for row in rows), "different": same(folder, rows),
    }  # fmt: skip


def describe(row: dict) -> str:
    return (
        f"kill {row['kill']:>3}  {row['kind']:<9} {row['seconds']:6.3f} s after the start, while {row['phase']:<9} "
        f"resumed from {row['from']:>4}, reached {row['reached']:>4}, kept {row['newest']:>4}, lost {row['lost']}"
    )


@dataclass(frozen=True, kw_only=True)
class KillsConfig:
    """Kill a run at random moments, resume it each time, and compare its bits with an uninterrupted run."""

    kills: int = 100
    """How often to kill it."""
    seed: int = 0
    """Seed of the random moments."""
    file: Path | None = None
    """File to append the rows to. None: a new one in benchmarks/results."""


def main(argv: Sequence[str]) -> int:
    options = flags.parse(KillsConfig, argv, "tests.long.kills")
    check_at_least(options, kills=1)
    path = options.file or harness.results_file("kills")

    def say(row: dict) -> None:
        harness.append_row(path, {"suite": "kills", **row})
        print(describe(row), flush=True)

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = kills(Path(folder), options.kills, options.seed, say)
    seconds = round(time.monotonic() - start, 1)
    harness.append_row(path, {"suite": "kills", "seconds": seconds, **found, "machine": versions.record()})
    hit = ", ".join(f"{n} {name}" for name, n in sorted(found["phases"].items()))
    print(f"{found['kills']} kills in {seconds:,.0f} s: {hit}; at most {found['most_lost']} steps lost of {EVERY}")
    print(f"step {found['steps']}, compared with an uninterrupted run: {found['different'] or 'the same bits'}")
    return int(bool(found["different"]) or found["most_lost"] > EVERY)


if __name__ == "__main__":
    run_main(main)
