"""Rows such as benchmarks write, made up for tests."""

import shutil

from benchmarks import harness, report

MACHINE = {
    "cpu": "Some(R) Processor", "threads": 2, "gpu": None, "torch": "2.15.0", "triton": None, "commit": "a" * 40,
    "dirty": False, "date": "2026-11-21T08:00:00+00:00",
}  # fmt: skip
H200 = MACHINE | {"gpu": "NVIDIA H200", "triton": "3.6.0"}


def spread(x: float) -> dict:
    return {"median": x, "p20": 0.9 * x, "p80": 1.1 * x}


def peer(name: str, speed: float, repetition: int = 0, machine=MACHINE, **changes) -> dict:
    row = {
        "suite": "peers", "name": name, "ours": name.startswith("torch"), "repetition": repetition, "status": "ok",
        "tokens_per_s": spread(speed), "ms": spread(1e6 / speed), "peak_memory": 2 * 10**9, "mfu": None, "agrees": True,
        "config": {"size": "nano", "B": 8, "T": 128, "precision": "bf16", "device": "cpu"}, "machine": machine,
    }  # fmt: skip
    return row | changes


def rung(name: str, speed: float, machine=MACHINE, **changes) -> dict:
    row = {
        "suite": "ladder", "rung": name, "status": "ok", "tokens_per_s": spread(speed), "ms": spread(1e6 / speed),
        "peak_memory": 2 * 10**9, "mfu": None, "agrees": True, "machine": machine,
        "config": {"size": "nano", "B": 8, "T": 128, "backend": "triton" if name == "triton" else "torch"},
    }  # fmt: skip
    return row | changes


def profile(backend: str) -> dict:
    return {
        "suite": "gpu", "stage": "profile", "backend": backend, "size": "gpt2", "B": 64, "T": 1024, "compile": True,
        "wall_ms": 130.0, "device_ms": 125.0, "groups": {"matmul": 80.0, "attention": 30.0, "copy": 15.0},
        "machine": H200,
    }  # fmt: skip


def tables(results) -> dict[str, str]:
    """The tables of these rows and of the repository's aot.jsonl."""
    copy_whole(results)
    return report.tables(results)


def copy_whole(results) -> None:
    """Copy aot.jsonl, which is written as a whole."""
    shutil.copy(harness.RESULTS / "aot.jsonl", results)


def write(results, folder: str, name: str, *found: dict) -> None:
    for row in found:
        harness.append_row(results / folder / name, row)


def cells(table: str) -> dict[str, list[str]]:
    """The cells of each line of a table by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {line[0].strip("*` "): [cell.strip() for cell in line[1:]] for line in lines}
