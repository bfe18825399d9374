"""The tables of docs/results.md and the pictures in benchmarks/plots, made from the raw rows in benchmarks/results.

A table stands between <!-- name --> and <!-- /name --> and is not edited by hand: a test checks that the page, the
pictures and the rows agree.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import floor, harness, plots
from benchmarks.rows import groups, latest, number, reason, rows_of, speeds, unmeasured
from gpt2fast.command import parse, run_main
from gpt2fast.errors import UserError
from gpt2fast.files.atomic import write_atomic

DOCUMENT = "docs/results.md"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
LOWEST = "tokens/s (lowest to highest run)"
HEADS = {
    "peers": ("step", LOWEST, "ms", "peak GB", "MFU", "x the best opponent"),
    "ladder": ("rung", "tokens/s (20th to 80th percentile)", "ms", "peak GB", "MFU", "x the first"),
    "generate": ("program", LOWEST, "ms a token", "peak GB", "", "x the best opponent"),  # without MFU
}
SHOWN = ("124M attention bf16", "124M layer norm, bf16 stream")  # the cases of benchmarks.aot in its table


@dataclass(frozen=True)
class ReportConfig:
    """Make the tables of docs/results.md and the pictures in benchmarks/plots from the raw rows."""

    check: bool = False
    """Write nothing: list what is stale, and exit with code 1 if anything is."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line) + " |" for line in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def sections(results: Path, suite: str, show: Callable[[str, list[dict]], str]) -> str:
    """A table for each configuration, and a sentence for each kind of device on which nothing was measured."""
    found = groups(results, suite)
    return "\n\n".join(
        [*unmeasured(found), *(f"**{each.title}** ({each.origin})\n\n{show(suite, each.rows)}" for each in found)]
    )


def speeds_table(suite: str, rows: Sequence[dict]) -> str:
    """Ours in bold, but in the ladder, where all rungs are."""
    lines = []
    for each in speeds(suite, rows):
        name = f"**{each.name}**" if each.ours and suite != "ladder" else each.name
        if each.tokens_per_s is None:
            lines.append([name, reason(each.last), "", "", "", ""])
            continue
        name += ("" if each.agrees else " (losses differ)") + (f" ({each.failed})" if each.failed else "")
        speed = number(each.tokens_per_s)
        speed += f" ({number(each.low)} to {number(each.high)})" if each.low and each.high else ""
        mfu = "unknown" if each.mfu is None else f"{each.mfu:.1%}"
        times = f"{each.times:.2f}" if each.times else ""
        lines.append([name, speed, number(each.ms), number(each.peak_memory / 1e9), mfu, times])
    columns = [i for i, word in enumerate(HEADS[suite]) if word]
    return table([HEADS[suite][i] for i in columns], ([line[i] for i in columns] for line in lines))


def ranks_table(_: str, rows: Sequence[dict]) -> str:
    lines = [
        [str(row["processes"]), str(row["numbers"]), f"{row['largest_relative_difference']:.1e}",
         f"{row['in_units_of_fp32']}", number(row["tokens_per_s"])]
        for row in latest(rows, "processes")
    ]  # fmt: skip
    heads = ["processes", "losses and norms", "largest relative difference from one process's"]
    return table([*heads, "in units of fp32 (2^-23)", "tokens/s"], lines)


def aot_table(rows: Sequence[dict]) -> str:
    """Registers per thread and KiB of shared memory per block at 124M's shapes, by the newest Triton in the rows."""
    newest = max((row["triton"] for row in rows), key=lambda version: [int(n) for n in re.findall(r"\d+", version)[:3]])
    found: dict[tuple, dict[int, str]] = {}
    for arch in ARCHITECTURES:
        seen: set[str] = set()
        for row in rows:
            if (row["triton"], row["arch"]) == (newest, arch) and row["case"] in SHOWN:
                residual = ", with residual" if row["kernel"] in seen else ""  # LayerNorm is launched without it first
                seen.add(row["kernel"])
                cell = f"{row['registers']}, {row['shared'] / 1024:.0f} KiB"
                found.setdefault((row["kernel"], residual, row["num_warps"]), {})[arch] = cell
    return table(
        ["kernel", *(f"sm_{arch}" for arch in ARCHITECTURES)],
        (
            [f"`{kernel}`{residual}, {warps} warps", *(cells.get(arch, "-") for arch in ARCHITECTURES)]
            for (kernel, residual, warps), cells in found.items()
        ),
    )


def tables(results: Path = harness.RESULTS) -> dict[str, str]:
    """Every table by the name of its markers."""
    return {
        **{suite: sections(results, suite, speeds_table) for suite in HEADS},
        "ranks": sections(results, "ranks", ranks_table),
        "floor": floor.of_results(results),
        "aot": aot_table(rows_of(results / "aot.jsonl")),
    }


def fill(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers of that name."""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise UserError(f"{DOCUMENT} has no place <!-- {name} --> ... <!-- /{name} -->: put the markers back")
    return f"{before}{start}{table}\n{end}{after}"


def update(root: Path, check: bool) -> list[str]:
    """Write the tables and pictures under `root` that are not what the rows say, unless `check`; return their names."""
    document, results, stale = root / DOCUMENT, root / "benchmarks/results", []
    text = document.read_text(encoding="utf-8")
    for name, made in tables(results).items():
        filled = fill(text, name, made)
        stale += [f"{DOCUMENT}, table {name}"] if filled != text else []
        text = filled
    if stale and not check:
        write_atomic(document, text)
    for name in plots.TITLES:
        path, found = root / f"benchmarks/plots/{name}.png", groups(results, name)
        if plots.fingerprint_in(path) != plots.fingerprint(name, found):
            stale.append(f"{path.relative_to(root)}")
            if not check:
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, plots.png(name, found))
    return stale


def main(argv: Sequence[str]) -> int:
    check = parse(ReportConfig, argv, "benchmarks.report").check
    stale = update(harness.ROOT, check)
    for what in stale:
        print(f"{what}: {'not what the rows say: run python -m benchmarks.report' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    run_main(main)
