"""The raw rows that count, and what they say together.

For each device and configuration the rows of the newest file count. Files are appended to: of two rows of one file
that measured the same thing, the later one counts.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpt2fast.errors import UserError
from gpt2fast.model import SIZES

# suite: the fields of a row, or of its "config", that tell one configuration from another.
# "profile": the rows of benchmarks.gpu that have one step's milliseconds by group of kernels.
CONFIG = {
    "ladder": ("size", "B", "T"),
    "peers": ("size", "B", "T", "precision", "device"),
    "generate": ("size", "B", "prompt", "tokens", "precision", "device"),
    "ranks": ("backend",),
    "profile": ("size", "B", "T"),
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
        """The GPU that was used, or None: a machine with a GPU may have been told to use its CPU."""
        return None if str(self.config.get("device", "")).startswith("cpu") else self.rows[-1]["machine"]["gpu"]

    @property
    def device(self) -> str:
        machine = self.rows[-1]["machine"]
        return self.gpu or f"{re.sub(r'[(](R|TM)[)]', '', machine['cpu'])}, {machine['threads']} threads"

    @property
    def title(self) -> str:
        """For example "gpt2, B=4, T=256, bf16 on NVIDIA H200"."""
        c = self.config
        words = [c.get("size") or c.get("backend"), *(f"{name}={c[name]}" for name in ("B", "T") if name in c)]
        words += [f"{c['prompt']} + {c['tokens']} tokens"] if "prompt" in c else []
        return ", ".join(filter(None, [*words, c.get("precision")])) + f" on {self.device}"

    @property
    def origin(self) -> str:
        """For example "torch 2.15.0, Triton 3.9.0, commit 744d43a, 2026-11-20"; all values where rows differ."""
        machines = [row["machine"] for row in self.rows]
        versions = {
            "torch": {m["torch"] for m in machines},
            "Triton": {m["triton"] for m in machines},
            "commit": {m["commit"] and m["commit"][:7] + (" with changes" if m["dirty"] else "") for m in machines},
            "": {m["date"][:10] for m in machines},
        }
        known = {name: " and ".join(sorted(filter(None, values))) for name, values in versions.items()}
        return ", ".join(f"{name} {values}".strip() for name, values in known.items() if values)


def rows_of(path: Path) -> list[dict]:
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {n}, is not JSON ({error}): delete the row if it was cut off") from None
    return rows


def groups(results: Path, suite: str) -> list[Group]:
    """The configurations of a suite, those of GPUs first, each with the rows of its newest file."""
    found: dict[tuple[str, str], Group] = {}
    files = [(path, rows_of(path)) for path in results.glob("*/*.jsonl")]
    for path, rows in sorted(files, key=lambda item: _age(*item)):
        machines = [row["machine"] for row in rows if "machine" in row]
        newer: dict[tuple[str, str], Group] = {}
        for row in rows:
            if ("profile" if row.get("suite") == "gpu" and "groups" in row else row.get("suite")) != suite:
                continue
            row = {"machine": machines[-1], **row}  # the machine of a profile stands in the row of its stage
            fields = row.get("config", row)
            config = {name: fields[name] for name in CONFIG[suite] if name in fields}
            key = path.parent.name, json.dumps(config, sort_keys=True)
            newer.setdefault(key, Group(path.parent.name, config, [])).rows.append(row)
        found |= newer
    return sorted(found.values(), key=_order)


def _age(path: Path, rows: Sequence[dict]) -> tuple[str, str, str]:
    """By the date in the file's name, and within a day by the date of its last row: commits have no order."""
    day = re.match(r"[\d-]{10}", path.name)
    last = max((row["machine"]["date"] for row in rows if "machine" in row), default="")
    return day.group() if day else "", last, str(path)


def _order(group: Group) -> tuple:
    sizes = [size for size in SIZES if size != "nano"]
    size, B, T = (group.config.get(name) for name in ("size", "B", "T"))
    return group.gpu is None, group.folder, sizes.index(size) if size in sizes else len(sizes), -(B or 0), T or 0


def unmeasured(found: Iterable[Group]) -> list[str]:
    """A sentence for each kind of device that none of these groups was measured on."""
    measured = {"GPU" if group.gpu else "CPU" for group in found}
    return [f"Not measured on a {kind} yet: no row exists." for kind in ("GPU", "CPU") if kind not in measured]


def latest(rows: Iterable[dict], *names: str) -> list[dict]:
    """One row for each value of `names`, the last one; a skipped row replaces no other."""
    found: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row.get(name) for name in names)
        if key not in found or row["status"] != "skipped":
            found[key] = row
    return list(found.values())


def reason(row: dict, length: int = 120) -> str:
    """Why a row has no numbers, in one short line."""
    said = row.get("why") or next((line for line in reversed(row.get("tail", "").splitlines()) if line.strip()), "")
    text = " ".join(f"{row['status']}: {said}".rstrip(": ").split())
    return text if len(text) <= length else text[: length - 1] + "…"


@dataclass(frozen=True)
class Speed:
    """What one program or rung reached."""

    name: str
    ours: bool
    last: dict  # its last row
    tokens_per_s: float | None = None  # None: it did not run, and `last` has the reason
    low: float | None = None
    high: float | None = None  # None: measured once
    ms: float = 0.0
    peak_memory: int = 0
    mfu: float | None = None
    agrees: bool = True
    failed: str = ""
    times: float | None = None  # the ratio of its tokens/s to the base's


def speeds(suite: str, rows: Iterable[dict]) -> list[Speed]:
    """The rungs of a ladder, in its order; of other suites the programs, the fastest first, and last what never ran."""
    if suite == "ladder":
        found = [_rung(row) for row in latest(rows, "rung")]
        base = next((each.tokens_per_s for each in found if each.tokens_per_s), None)
    else:
        names: dict[str, list[dict]] = {}
        for row in latest(rows, "name", "repetition"):
            names.setdefault(row["name"], []).append(row)
        found = [_program(name, repetitions) for name, repetitions in names.items()]
        found.sort(key=lambda each: -(each.tokens_per_s or 0.0))
        base = next((each.tokens_per_s for each in found if not each.ours), None)  # the best opponent's
    return [replace(each, times=each.tokens_per_s / base) if base and each.tokens_per_s else each for each in found]


def _rung(row: dict) -> Speed:
    """Median, 20th and 80th percentile of the steps of one rung."""
    swapped = row["config"].get("swapped")
    name = f"fused, with our {swapped}" if swapped else RUNGS.get(row["rung"], row["rung"])
    ours = row["config"]["backend"] == "triton" or bool(swapped)
    if row["status"] != "ok":
        return Speed(name, ours, row)
    spread, agrees = row["tokens_per_s"], row["agrees"] is not False
    speed = spread["median"], spread["p20"], spread["p80"], row["ms"]["median"]
    return Speed(name, ours, row, *speed, row["peak_memory"], row["mfu"], agrees)


def _program(name: str, rows: Sequence[dict]) -> Speed:
    """Medians over the repetitions' medians, the lowest and the highest speed, the largest peak memory."""
    ok = [row for row in rows if row["status"] == "ok"]
    if not ok:
        return Speed(name, rows[0]["ours"], rows[-1])
    medians = [row["tokens_per_s"]["median"] for row in ok]
    shares = [row["mfu"] for row in ok if row.get("mfu") is not None]
    return Speed(
        name,
        rows[0]["ours"],
        rows[-1],
        statistics.median(medians),
        min(medians) if len(ok) > 1 else None,
        max(medians) if len(ok) > 1 else None,
        ms=statistics.median(row["ms"]["median"] if "ms" in row else row["ms_per_token"] for row in ok),
        peak_memory=max(row["peak_memory"] for row in ok),
        mfu=statistics.median(shares) if shares else None,
        agrees=all(row.get("agrees") is not False for row in ok),
        failed=f"{len(rows) - len(ok)} of {len(rows)} did not run" if len(ok) < len(rows) else "",
    )


def number(x: float) -> str:
    """Three digits; a repeated measurement agrees in fewer. 6,630; 93.6; 0.214."""
    x = float(f"{x:.3g}")
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:#.3g}"
