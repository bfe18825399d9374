"""Raw rows -> the README's tables: `python -m benchmarks.report`.

A table stands between <!-- name --> and <!-- /name -->, is made of the rows under results/, and never edited by hand; a
test holds that README and rows agree.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from gpt2fast.errors import UserError, run_main
from gpt2fast.files import write_atomic

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHOWN = ("124M attention bf16", "124M layer norm, bf16 stream")


def aot_table(rows: Sequence[dict]) -> str:
    """Registers a thread and KiB of shared memory a block, as the newest Triton has it, at 124M's shapes."""
    newest = max((row["triton"] for row in rows), key=lambda version: [int(n) for n in re.findall(r"\d+", version)[:3]])
    found: dict[tuple, list[str]] = {}
    for arch in ARCHITECTURES:
        seen: set[str] = set()
        for row in rows:
            if (row["triton"], row["arch"]) == (newest, arch) and row["case"] in SHOWN:
                residual = ", with residual" if row["kernel"] in seen else ""  # LayerNorm is launched without it first
                seen.add(row["kernel"])
                cell = f"{row['registers']}, {row['shared'] / 1024:.0f} KiB"
                found.setdefault((row["kernel"], residual, row["num_warps"]), []).append(cell)
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |"]
    lines.append("|---" * (len(ARCHITECTURES) + 1) + "|")
    for (kernel, residual, warps), cells in found.items():
        lines.append(f"| `{kernel}`{residual}, {warps} warps | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(results: Path = harness.RESULTS) -> dict[str, str]:
    """Every table by the name of its markers."""
    return {"aot": aot_table(rows_of(results / "aot.jsonl"))}


def fill(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers of that name."""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise UserError(f"README.md has no place <!-- {name} --> ... <!-- /{name} -->: put the markers back")
    return f"{before}{start}{table}\n{end}{after}"


def main(argv: Sequence[str]) -> int:
    path = harness.ROOT / "README.md"
    text = path.read_text()
    for name, table in tables().items():
        text = fill(text, name, table)
    write_atomic(path, text)
    return 0


if __name__ == "__main__":
    run_main(main)
