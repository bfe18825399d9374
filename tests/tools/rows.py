"""Rows as benchmarks leave them, made up."""

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


def kernel(provider: str, ms: float, direction: str = "both", **changes) -> dict:
    row = {
        "suite": "kernels", "op": "gelu", "size": "gpt2", "shape": {"M": 65536, "N": 3072}, "dtype": "bf16",
        "provider": provider, "direction": direction, "status": "ok", "ms": spread(ms), "gb_per_s": 1000 / ms,
        "share": 1 / (4 * ms), "ceilings": {"gb_per_s": 4000.0, "tflops": 700.0}, "machine": H200,
    }  # fmt: skip
    return row | changes


def profile(backend: str) -> dict:
    return {
        "suite": "gpu", "stage": "profile", "backend": backend, "size": "gpt2", "B": 64, "T": 1024, "compile": True,
        "wall_ms": 130.0, "device_ms": 125.0, "groups": {"matmul": 80.0, "attention": 30.0, "copy": 15.0},
        "machine": H200,
    }  # fmt: skip


def tables(results) -> dict[str, str]:
    """Of these rows, and of the repository's kernels compiled ahead of time."""
    copy_whole(results)
    return report.tables(results)


def copy_whole(results) -> None:
    """The file that is not measured again a part at a time."""
    shutil.copy(harness.RESULTS / "aot.jsonl", results)


def write(results, folder: str, name: str, *found: dict) -> None:
    for row in found:
        harness.append_row(results / folder / name, row)


def cells(table: str) -> dict[str, list[str]]:
    """First cell -> the others."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {line[0].strip("*` "): [cell.strip() for cell in line[1:]] for line in lines}
