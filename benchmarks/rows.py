"""Which raw rows count, and what they say together.

Of each device and configuration the newest file's rows count. Files are appended to, never edited: what was measured
again in one file counts as the later row has it.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2fast.errors import UserError
from gpt2fast.model import SIZES

UNMEASURED = "Not measured on a {} yet: no row exists."


def _pick(row: dict, *names: str) -> dict:
    return {name: row[name] for name in names if name in row}


# suite: what tells one configuration from another. "profile" are the rows of one step's milliseconds by group.
CONFIG: dict[str, Callable[[dict], dict]] = {
    "ladder": lambda row: _pick(row["config"], "size", "B", "T"),
    "peers": lambda row: _pick(row["config"], "size", "B", "T", "precision", "device"),
    "generate": lambda row: _pick(row["config"], "size", "B", "prompt", "tokens", "precision", "device"),
    "kernels": lambda row: _pick(row, "op", "size", "shape"),
    "ranks": lambda row: _pick(row, "backend"),
    "profile": lambda row: _pick(row, "size", "B", "T"),
}


RUNGS = {
    "fp32": "fp32, eager",
    "allocator": "+ allocator settings",
    "tf32": "+ TF32",
    "bf16": "+ bf16 autocast",
    "compile": "+ torch.compile",
    "fused": "+ fused AdamW",
    "triton": "+ our kernels",
    "all": "+ all our options",
    "graph": "+ CUDA graph",
    "visible": "+ visible ops",
    "recompute": "+ activation checkpointing",
}


@dataclass(frozen=True)
class Group:
    """The rows of one configuration on one device."""

    folder: str
    config: dict
    rows: list[dict]

    @property
    def gpu(self) -> str | None:
        """The GPU that computed, if one did: a CPU may have been asked for on a machine that has one."""
        return None if str(self.config.get("device", "")).startswith("cpu") else self.rows[-1]["machine"]["gpu"]

    @property
    def device(self) -> str:
        machine = self.rows[-1]["machine"]
        return self.gpu or f"{re.sub(r'[(](R|TM)[)]', '', machine['cpu'])}, {machine['threads']} threads"

    @property
    def title(self) -> str:
        """ "gpt2, B=4, T=256, bf16 on NVIDIA H200" """
        c = self.config
        words = [c.get("size") or c.get("backend"), *(f"{name}={c[name]}" for name in ("B", "T") if name in c)]
        words += [f"{c['prompt']} + {c['tokens']} tokens"] if "prompt" in c else []
        return ", ".join(filter(None, [*words, c.get("precision")])) + f" on {self.device}"

    @property
    def origin(self) -> str:
        return origin(self.rows)


def origin(rows: Iterable[dict]) -> str:
    """ "torch 2.15.0, Triton 3.9.0, commit 744d43a, 2026-11-20"; several of each where rows differ."""
    machines = [row["machine"] for row in rows]

    def each(name: str, of: Callable[[dict], str | None]) -> list[str]:
        values = sorted({value for value in map(of, machines) if value})
        return [f"{name} {' and '.join(values)}".strip()] if values else []

    def commit(machine: dict) -> str | None:
        return machine["commit"] and machine["commit"][:7] + (" with changes" if machine["dirty"] else "")

    return ", ".join(
        [
            *each("torch", lambda machine: machine["torch"]),
            *each("Triton", lambda machine: machine["triton"]),
            *each("commit", commit),
            *each("", lambda machine: machine["date"][:10]),
        ]
    )


def rows_of(path: Path) -> list[dict]:
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {n}, is no JSON ({error}): a row that was cut off is to be deleted"
            ) from None
    return rows


def groups(results: Path, suite: str) -> list[Group]:
    """The configurations of a suite, GPUs first, each with the rows of its newest file."""
    found: dict[tuple[str, str], Group] = {}
    files = [(path, rows_of(path)) for path in sorted(results.glob("*/*.jsonl"))]
    for path, rows in sorted(files, key=lambda item: _age(*item)):
        machines = [row["machine"] for row in rows if "machine" in row]
        newer: dict[tuple[str, str], Group] = {}
        for row in rows:
            if _suite(row) != suite:
                continue
            row = {"machine": machines[-1], **row}  # a profile's row has none of its own, its stage's has
            config = CONFIG[suite](row)
            key = path.parent.name, json.dumps(config, sort_keys=True)
            newer.setdefault(key, Group(path.parent.name, config, [])).rows.append(row)
        found |= newer
    return sorted(found.values(), key=_order)


def _suite(row: dict) -> str | None:
    return "profile" if row.get("suite") == "gpu" and "groups" in row else row.get("suite")


def _age(path: Path, rows: Sequence[dict]) -> tuple[str, str]:
    """By the date in a file's name, and within a day by when its last row was measured: commits have no order."""
    day = re.match(r"[\d-]{10}", path.name)
    return day.group() if day else "", max((row["machine"]["date"] for row in rows if "machine" in row), default="")


def _order(group: Group) -> tuple:
    sizes = [size for size in SIZES if size != "nano"]
    size, B, T = (group.config.get(name) for name in ("size", "B", "T"))
    return group.gpu is None, group.folder, sizes.index(size) if size in sizes else len(sizes), -(B or 0), T or 0


def latest(rows: Iterable[dict], *names: str) -> list[dict]:
    """One row for each value of `names`, the last that was measured: one that was only skipped hides none before it."""
    found: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row.get(name) for name in names)
        if key not in found or row["status"] != "skipped":
            found[key] = row
    return list(found.values())


def rung(row: dict) -> str:
    """What a rung of the ladder adds, in words."""
    swapped = row["config"].get("swapped")
    return f"fused, with our {swapped}" if swapped else RUNGS.get(row["rung"], row["rung"])


def reason(row: dict, length: int = 120) -> str:
    """Why a row has no numbers, in one short line."""
    said = row.get("why") or next((line for line in reversed(row.get("tail", "").splitlines()) if line.strip()), "")
    text = " ".join(f"{row['status']}: {said}".rstrip(": ").split())
    return text if len(text) <= length else text[: length - 1] + "…"


def compared(rows: Iterable[dict], ms: str) -> list[dict]:
    """What each name reached over its repetitions, the fastest first, and how many times the best opponent that is.

    Medians of the repetitions' medians, the lowest and the highest of them, the largest peak memory; those that never
    ran come last, with "why".
    """
    names: dict[str, list[dict]] = {}
    for row in latest(rows, "name", "repetition"):
        names.setdefault(row["name"], []).append(row)
    found = [_repeated(name, repetitions, ms) for name, repetitions in names.items()]
    best = max((each["tokens_per_s"] for each in found if not each["ours"] and not each["why"]), default=None)
    for each in found:
        each["times"] = each["tokens_per_s"] / best if best and not each["why"] else None
    return sorted(found, key=lambda each: -each.get("tokens_per_s", 0.0))


def _repeated(name: str, rows: Sequence[dict], ms: str) -> dict:
    ok = [row for row in rows if row["status"] == "ok"]
    common = {"name": name, "ours": rows[0]["ours"], "runs": len(ok), "failed": len(rows) - len(ok)}
    if not ok:
        return common | {"why": reason(rows[-1])}
    speeds = [row["tokens_per_s"]["median"] for row in ok]
    times = [row[ms]["median"] if isinstance(row[ms], dict) else row[ms] for row in ok]
    shares = [row["mfu"] for row in ok if row.get("mfu") is not None]
    return common | {
        "why": None,
        "tokens_per_s": statistics.median(speeds),
        "low": min(speeds),
        "high": max(speeds),
        "ms": statistics.median(times),
        "peak_memory": max(row["peak_memory"] for row in ok),
        "mfu": statistics.median(shares) if shares else None,
        "agrees": all(row.get("agrees") is not False for row in ok),
    }


def number(x: float) -> str:
    """Three digits, which is more than repeats: 6,630; 93.6; 0.214."""
    x = float(f"{x:.3g}")
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:#.3g}"
