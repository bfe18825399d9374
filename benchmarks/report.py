"""Raw rows -> tables and plots: `python -m benchmarks.report`; with `--check` it writes nothing.

A table stands between <!-- name --> and <!-- /name -->, is made of the rows under results/, and never edited by hand; a
test holds that documents, plots and rows agree. To have a plot drawn anew although its rows are the same, delete it.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import floor, harness, plots
from benchmarks.rows import UNMEASURED, Group, compared, groups, latest, number, origin, reason, rows_of, rung
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.files.atomic import write_atomic

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
REPRODUCTION = 10**10  # tokens, of FineWeb's sample-10BT
# tokens/s of one GPU of eight, for a yardstick where nothing of ours is measured
PUBLISHED = {
    "one of 8 NVIDIA A100 80GB SXM, llm.c": (218_000, "300 ms a step: its `scripts/run_gpt2_124M.sh`"),
    "one of 8 NVIDIA H100 SXM, llm.c": (468_000, "140 ms a step: modded-nanogpt's log of it, 2024-10-13"),
}
DOCUMENT = "README.md"  # where the tables stand
SHOWN = ("124M attention bf16", "124M layer norm, bf16 stream")


def aot_table(rows: Sequence[dict]) -> str:
    """Registers a thread and KiB of shared memory a block, as the newest Triton has it, at 124M's shapes."""
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


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line) + " |" for line in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def sections(results: Path, suite: str, show: Callable[[Group], str], kinds: Sequence[str] = ("GPU", "CPU")) -> str:
    """What was measured, configuration by configuration, and on what nothing was."""
    found = groups(results, suite)
    parts = []
    for kind in kinds:
        of_kind = [group for group in found if (group.gpu is None) == (kind == "CPU")]
        parts += [f"**{group.title}** ({group.origin})\n\n{show(group)}" for group in of_kind]
        parts += [] if of_kind else [UNMEASURED.format(kind)]
    return "\n\n".join(parts)


def ladder_table(group: Group) -> str:
    rows = latest(group.rows, "rung")
    base = next((row["tokens_per_s"]["median"] for row in rows if row["status"] == "ok"), None)
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([rung(row), reason(row), "", "", "", ""])
            continue
        speed, differ = row["tokens_per_s"], "" if row["agrees"] is not False else " (losses differ)"
        spread = f"{number(speed['median'])} ({number(speed['p20'])} to {number(speed['p80'])})"
        tail = [number(row["ms"]["median"]), number(row["peak_memory"] / 1e9), share(row["mfu"])]
        lines.append([rung(row) + differ, spread, *tail, f"{speed['median'] / base:.2f}"])
    return table(["rung", "tokens/s (20th to 80th percentile)", "ms", "peak GB", "MFU", "x the first"], lines)


def share(of_peak: float | None) -> str:
    return "unknown" if of_peak is None else f"{of_peak:.1%}"


def peers_table(group: Group) -> str:
    return compared_table(group, "step", "ms", "ms", mfu=True)


def generate_table(group: Group) -> str:
    return compared_table(group, "program", "ms a token", "ms_per_token", mfu=False)


def compared_table(group: Group, what: str, unit: str, ms: str, mfu: bool) -> str:
    """Ours in bold."""
    lines = []
    for each in compared(group.rows, ms):
        name = f"**{each['name']}**" if each["ours"] else each["name"]
        if each["why"]:
            lines.append([name, each["why"], "", "", *([""] if mfu else []), ""])
            continue
        name += "" if each["agrees"] else " (losses differ)"
        name += f" ({each['failed']} of {each['failed'] + each['runs']} did not run)" if each["failed"] else ""
        spread = f" ({number(each['low'])} to {number(each['high'])})" if each["runs"] > 1 else ""
        tail = [number(each["ms"]), number(each["peak_memory"] / 1e9), *([share(each["mfu"])] if mfu else [])]
        times = f"{each['times']:.2f}" if each["times"] else ""
        lines.append([name, number(each["tokens_per_s"]) + spread, *tail, times])
    head = [what, "tokens/s (lowest to highest run)", unit, "peak GB", *(["MFU"] if mfu else []), "x the best opponent"]
    return table(head, lines)


def reproduce_table(results: Path) -> str:
    """What 10 billion tokens take at the speed of our best step of gpt2 on each device, and at published ones."""
    ours: dict[str, dict] = {}
    for group in groups(results, "peers"):
        found = [each for each in compared(group.rows, "ms") if each["ours"] and not each["why"]]
        if group.config["size"] == "gpt2" and found:
            best = max(found, key=lambda each: each["tokens_per_s"])
            step = f"ours, {best['name']}, B={group.config['B']}, T={group.config['T']}, {group.config['precision']}"
            if best["tokens_per_s"] > ours.get(group.device, {"speed": 0})["speed"]:
                ours[group.device] = {"speed": best["tokens_per_s"], "source": step, "gpu": group.gpu}
    lines = [[f"**{device}**", *_reproduction(each["speed"]), each["source"]] for device, each in ours.items()]
    lines += [[device, *_reproduction(speed), source] for device, (speed, source) in PUBLISHED.items()]
    made = table(["device", "tokens/s", "hours", "cost at $1 an hour", "where the speed is from"], lines)
    measured = any(each["gpu"] for each in ours.values())
    return made if measured else f"Ours on a GPU: not measured yet.\n\n{made}"


def _reproduction(speed: float) -> list[str]:
    hours = number(REPRODUCTION / speed / 3600)
    return [number(speed), hours, f"${hours}"]


def kernels_tables(results: Path) -> str:
    """At gpt2's shapes, our kernel beside the best of the others; rows of a CPU only try the program."""
    folders: dict[str, list[Group]] = {}
    for group in groups(results, "kernels"):
        if group.gpu and group.config["size"] == "gpt2":
            folders.setdefault(group.folder, []).append(group)
    parts = []
    for found in folders.values():
        found = shortest(found)
        rows = [row for group in found for row in group.rows]
        ceilings = rows[-1]["ceilings"]
        measured = f"copies {number(ceilings['gb_per_s'])} GB/s and multiplies {number(ceilings['tflops'])} TFLOP/s"
        parts.append(f"**gpt2, bf16 on {found[0].device}** ({origin(rows)}; it {measured})\n\n{kernels_table(found)}")
    return "\n\n".join(parts or [UNMEASURED.format("GPU")])


def shortest(found: Sequence[Group]) -> list[Group]:
    """Each op at one shape: attention, which is measured at many T, at the smallest, GPT-2's own."""
    ops: dict[str, Group] = {}
    for group in found:
        op, T = group.config["op"], group.config["shape"].get("T", 0)
        if op not in ops or ops[op].config["shape"].get("T", 0) > T:
            ops[op] = group
    return list(ops.values())


def kernels_table(found: Sequence[Group]) -> str:
    lines = []
    for group in found:
        rows = latest(group.rows, "provider", "direction")
        for direction, words in (("forward", "forward"), ("both", "forward + backward")):
            mine = [row for row in rows if row["provider"] == "triton"]
            ours = next((row for row in mine if row["direction"] == direction), mine[-1] if mine else None)
            others = [row for row in rows if row["provider"] != "triton" and row["direction"] == direction]
            best = min(
                (row for row in others if row["status"] == "ok"), key=lambda row: row["ms"]["median"], default=None
            )
            theirs = f"{number(best['ms']['median'])} ({best['provider']})" if best else "none ran"
            line = [f"`{group.config['op']}`, {words}"]
            if ours is None or ours["status"] != "ok" or ours["direction"] != direction:
                why = reason(ours) if ours and ours["status"] != "ok" else "not measured"
                lines.append([*line, why, theirs, "", ""])
                continue
            ms = ours["ms"]["median"]
            times = f"{best['ms']['median'] / ms:.2f}" if best else ""
            lines.append([*line, number(ms), theirs, times, f"{ours['share']:.0%}"])
    return table(["kernel", "ours, ms", "best opponent, ms", "x the best opponent", "share of the ceiling"], lines)


def ranks_table(group: Group) -> str:
    lines = [
        [str(row["processes"]), str(row["numbers"]), f"{row['largest_relative_difference']:.1e}",
         f"{row['in_units_of_fp32']}", number(row["tokens_per_s"])]
        for row in latest(group.rows, "processes")
    ]  # fmt: skip
    heads = ["processes", "losses and norms", "largest relative difference from one process's"]
    return table([*heads, "in units of fp32 (2^-23)", "tokens/s"], lines)


def tables(results: Path = harness.RESULTS) -> dict[str, str]:
    """Every table by the name of its markers."""
    return {
        "ladder": sections(results, "ladder", ladder_table),
        "peers": sections(results, "peers", peers_table),
        "kernels": kernels_tables(results),
        "reproduce": reproduce_table(results),
        "generate": sections(results, "generate", generate_table),
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
    """What did not match the rows under `root`; now it does, unless this is only to be checked."""
    results, folder = root / "benchmarks/results", root / "benchmarks/plots"
    stale = []
    for name, made in tables(results).items():
        text = (root / DOCUMENT).read_text(encoding="utf-8")
        filled = fill(text, name, made)
        if filled != text:
            stale.append(f"{DOCUMENT}, table {name}")
            if not check:
                write_atomic(root / DOCUMENT, filled)
    for name, plot in plots.PLOTS.items():
        path, data = folder / f"{name}.png", plot.data(results)
        if plots.fingerprint_in(path) != plots.fingerprint(data):
            stale.append(f"{path.relative_to(root)}")
            if not check:
                folder.mkdir(exist_ok=True)
                write_atomic(path, plots.png(plot, data))
    return stale


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 and a list if anything is stale")
    check = p.parse_args(argv).check
    stale = update(harness.ROOT, check)
    for what in stale:
        print(f"{what}: {'not what the rows say' if check else 'made anew'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    run_main(main)
