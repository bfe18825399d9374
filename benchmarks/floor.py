"""Count the step's floor, and the milliseconds above it: `python -m benchmarks.floor [--profile FILE]`.

What an ideal step and ours multiply and move is counted in benchmarks/step_parts.py. For each group of kernels

    counted - floor     is what missing fusion costs (negative where ours needs less than the floor assumes),
    measured - counted  is how far our kernels are from the card's ceilings,

and the groups are those of a profile (benchmarks/step_profile.py), which is set beside them. For gpt2, B=64, T=1024 at
an H200's 790 TFLOP/s and 4.3 TB/s the floor is 61.5 + 5.5 + 9.4 = 76.4 ms: matmuls, attention, memory.

The tables are Markdown. Without --profile, the measured column is the newest profile of this shape among the results.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from benchmarks import flags, harness
from benchmarks.rows import groups, rows_of
from benchmarks.step_parts import ALL, MEMORY, Options, Part, parts
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.model import SIZES


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches; the defaults are an H200's, as measured."""

    tflops: float = 790.0  # bf16 matmul
    tb_per_s: float = 4.3  # of a copy, read + written
    memory: float = MEMORY  # bytes


def milliseconds(work: float, moved: float, ceilings: Ceilings) -> float:
    return work / ceilings.tflops / 1e9 + moved / ceilings.tb_per_s / 1e9


NEXT = {
    "matmul": "the epilogue's tiles by benchmarks.tune, against cuBLAS; FP8 for the head (4 to 6 ms)",
    "attention": "tiles by benchmarks.tune; TMA in the forward; 64 rows to a tile on the diagonal; specialised warps",
    "layer norm": "rows and stages by benchmarks.tune; the first LayerNorm in the embedding's kernel",
    "gelu": "mlp=epilogue, if its matmuls stay within a few per cent of cuBLAS",
    "cross-entropy": "the head's scale folded into AdamW; block by benchmarks.tune: rows in flight must fit into L2",
    "embedding": "positions and tokens from one reading of dx",
    "optimizer": "AdamW's chunk by benchmarks.tune; a bf16 gradient of the head",
    "copy": "the head's weight rounded by AdamW like the others",
    "elementwise": "bias gradients summed where LayerNorm's and attention's backward write them",
    "other": "kernels whose names match no group: give them one in step_profile.py",
    "device idle": "the whole step as a CUDA graph",
}


class Line(NamedTuple):
    """A line of the table; measured is None where there is no profile."""

    group: str
    flops: float
    bytes: float
    floor: float
    counted: float
    measured: float | None

    @property
    def missing(self) -> float:
        return (self.counted if self.measured is None else self.measured) - self.floor


def lines(found: Sequence[Part], ceilings: Ceilings, measured: dict[str, float] | None = None) -> list[Line]:
    """Return a line for each group of kernels, and for each that only the profile has."""
    made = []
    for group in NEXT:
        of = [part for part in found if part.group == group]
        if not of and not (measured or {}).get(group):
            continue
        work, moved = sum(part.flops for part in of), sum(part.bytes for part in of)
        counted = sum(milliseconds(part.our_flops, part.our_bytes, ceilings) for part in of)
        ms = None if measured is None else measured.get(group, 0.0)
        made.append(Line(group, work, moved, milliseconds(work, moved, ceilings), counted, ms))
    return made


def groups_of(row: dict) -> dict[str, float]:
    """Return milliseconds by group of a profile's row; the step's time without its kernels' is the device idle."""
    return row["groups"] | {"device idle": max(0.0, row["wall_ms"] - row["device_ms"])}


def cells(line: Line) -> list[str]:
    """Return a line of the table, without "-0.00"."""
    work = [f"{line.flops / 1e12:.2f} TFLOP"] * bool(line.flops) + [f"{line.bytes / 1e9:.2f} GB"] * bool(line.bytes)
    measured = "not measured" if line.measured is None else f"{line.measured:.2f}"
    missing = round(line.missing, 2) + 0.0
    numbers = [f"{line.floor:.2f}", f"{line.counted:.2f}", measured, f"{missing:.2f}"]
    return [line.group, ", ".join(work) or "-", *numbers, NEXT.get(line.group, "-") if missing > 0 else "-"]


HEAD = ["group", "work", "floor ms", "ours, counted ms", "measured ms", "missing ms", "next thing to try"]


def total(made: Sequence[Line]) -> Line:
    flops, bytes, floor, counted = (sum(column) for column in list(zip(*made))[1:5])
    measured = None if made[0].measured is None else sum(line.measured or 0.0 for line in made)
    return Line("step", flops, bytes, floor, counted, measured)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, aligned, since a terminal shows it too."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    rows = (head, ["-" * width for width in widths], *body)
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows)


def table(made: Sequence[Line]) -> str:
    """Return the lines as a table, their sum last."""
    return markdown(HEAD, [cells(line) for line in (*made, total(made))])


def kinds(found: Sequence[Part], ceilings: Ceilings) -> dict[str, float]:
    """Return the floor's milliseconds: those of two groups' products, and those of all bytes."""
    made = {
        group: sum(milliseconds(part.flops, 0, ceilings) for part in found if part.group == group)
        for group in ("matmul", "attention")
    }
    return made | {"memory-bound": sum(milliseconds(0, part.bytes, ceilings) for part in found)}


def split(found: Sequence[Part], ceilings: Ceilings) -> str:
    matmuls, attention, memory = (ms := kinds(found, ceilings)).values()
    return f"floor {sum(ms.values()):.1f} ms = matmuls {matmuls:.1f} + attention {attention:.1f} + memory {memory:.1f}"


def ceilings_of(rows: Iterable[dict]) -> Ceilings | None:
    """Return what the device of these rows copied and multiplied in the same run; None if they do not tell."""
    copy, matmul, memory = None, None, Ceilings.memory
    for row in rows:
        memory = row.get("machine", {}).get("gpu_memory", memory)
        if row.get("suite") == "kernels":
            copy, matmul = row["ceilings"]["gb_per_s"], row["ceilings"]["tflops"]
        elif row.get("measured") == "copy":
            copy = row["gb_per_s"]["median"]
        elif row.get("measured") and row["shape"] == [8192, 8192, 8192]:
            matmul = row["tflops"]["median"]
    return Ceilings(matmul, copy / 1e3, memory) if copy and matmul else None


def beside(row: dict, ceilings: Ceilings) -> list[Line]:
    """Return the lines of a profile's row beside its floor."""
    shape = SIZES[row["size"]], row["B"], row["T"]
    ours = Options(**row.get("options", {}))
    return lines(parts(*shape, ours, ceilings.memory), ceilings, groups_of(row))


def newest(results: Path, shape: dict) -> tuple[list[dict], Ceilings | None]:
    """Return the profiles of this shape of the first GPU among the results that has any, and that GPU's ceilings."""
    for group in groups(results, "profile"):
        if group.gpu and group.config == shape:
            files = sorted((results / group.folder).glob("*.jsonl"))
            return group.rows, ceilings_of(row for path in files for row in rows_of(path))
    return [], None


def text(
    shape: tuple[str, int, int], profiles: Sequence[dict], ceilings: Ceilings, ours: Options = ALL, each: bool = False
) -> str:
    """Return the tables of these profiles, or of the count where there are none."""
    said = [f"ceilings: {ceilings.tflops:,.0f} TFLOP/s bf16, {ceilings.tb_per_s:.2f} TB/s"]
    for row in profiles:
        said += [f"{row['size']}, B={row['B']}, T={row['T']}, {row.get('rung', row['backend'])}, one step:"]
        said += [table(beside(row, ceilings))]
    if not profiles:
        size, B, T = shape
        found = parts(SIZES[size], B, T, ours, ceilings.memory)
        said += [f"{size}, B={B}, T={T}, by count alone, no profile of a GPU: {split(found, ceilings)}"]
        said += [table(lines(found, ceilings))] + [parts_table(found, ceilings)] * each
    return "\n\n".join(said)


def of_results(results: Path) -> str:
    """Return the tables of GPT-2's own shape, for the results' page."""
    profiles, seen = newest(results, {"size": "gpt2", "B": 64, "T": 1024})
    return text(("gpt2", 64, 1024), profiles, seen or Ceilings())


def parts_table(found: Sequence[Part], ceilings: Ceilings) -> str:
    """Return a line for each part."""
    body = []
    for part in found:
        ideal = milliseconds(part.flops, part.bytes, ceilings)
        own = milliseconds(part.our_flops, part.our_bytes, ceilings)
        body.append([part.name, part.group, f"{ideal:.2f}", f"{own:.2f}"])
    return markdown(["part", "group", "floor ms", "ours, counted ms"], body)


@dataclass(frozen=True, kw_only=True)
class FloorConfig:
    """Count the step's floor, and the milliseconds above it."""

    size: flags.Size = "gpt2"
    """Model."""
    batch_size: int = 64
    """Sequences in a batch, B."""
    seq_len: int = 1024
    """Tokens in a sequence, T."""
    off: tuple[Literal["residual", "epilogue", "embedding", "one_pass", "adamw"], ...] = ()
    """Options of our step that are off."""
    recompute: bool = False
    """Count activation checkpointing."""
    profile: Path | None = None
    """A gpu.jsonl of benchmarks.gpu: its profiles, and its ceilings."""
    tflops: float | None = None
    """TFLOP/s of a bf16 matmul. None: as measured in the file, or an H200's."""
    tb_per_s: float | None = None
    """TB/s of a copy, read + written. None: as measured in the file, or an H200's."""
    parts: bool = False
    """Print the parts of each group too."""


def run(c: FloorConfig, results: Path = harness.RESULTS) -> int:
    """Print the tables."""
    check_at_least(c, batch_size=1, seq_len=1, tflops=0.001, tb_per_s=0.001)
    if c.profile:
        if not c.profile.is_file():
            raise UserError(f"--profile {c.profile} is not a file: name the gpu.jsonl that benchmarks.gpu wrote")
        rows = rows_of(c.profile)
        profiles = [row for row in rows if row.get("suite") == "gpu" and "groups" in row]
        seen = ceilings_of(rows)
    else:
        profiles, seen = newest(results, {"size": c.size, "B": c.batch_size, "T": c.seq_len})
    seen = seen or Ceilings()
    ceilings = Ceilings(c.tflops or seen.tflops, c.tb_per_s or seen.tb_per_s, seen.memory)
    on = {f.name: f.name not in c.off for f in fields(Options)} | {"recompute": c.recompute}
    print(text((c.size, c.batch_size, c.seq_len), profiles, ceilings, Options(**on), c.parts))
    return 0


def main(argv: Sequence[str]) -> int:
    return run(flags.parse(FloorConfig, argv, "benchmarks.floor"))


if __name__ == "__main__":
    run_main(main)
