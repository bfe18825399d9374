"""The step's floor, and where the milliseconds above it are: `python -m benchmarks.floor [--profile FILE]`.

Everything is counted from the shapes. `flops` and `bytes` are those of an ideal step: matmuls read and write under
cover of their arithmetic, whatever can be fused is, nothing passes over memory twice. `our_flops` and `our_bytes` are
those of our compiled step with its options on or off. So of each group of kernels

    counted - floor     is what fusion is missing (less than nothing where ours needs less than the floor assumed),
    measured - counted  is how far our kernels are from the card's ceilings,

and the groups are those of a profile (benchmarks/step_profile.py), whose row is set beside them. At gpt2, B=64, T=1024
and an H200's 790 TFLOP/s and 4.3 TB/s the floor is 61.5 + 5.5 + 9.4 = 76.4 ms: matmuls, attention, memory.

    M = B T tokens;  a way = 2 M C bytes, once over a bf16 [M, C];  P parameters, of which W in the blocks' matrices

The tables are Markdown. Without --profile, measured is what the newest profile among the results says of this shape.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from benchmarks.rows import groups, rows_of
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.model import SIZES, GPTConfig
from gpt2fast.training import flops

# Of kernels/, which imports Triton, and this shall not: launch.py's budget of the head's logits; the tiles of
# attention, which on the diagonal are computed whole.
HEAD_BYTES, HEAD_SHARE, TILE = 2**30, 16, 128


@dataclass(frozen=True)
class Ceilings:
    """Of a device: bf16 matmul; a copy's bytes, read and written; memory. The default is an H200, as it was seen."""

    tflops: float = 790.0
    tb_per_s: float = 4.3
    memory: float = 150e9


@dataclass(frozen=True)
class Options:
    """Of our step: those that change what it multiplies or moves."""

    residual: bool = False  # its stream in bf16
    epilogue: bool = False  # GELU in the matmuls' epilogues
    embedding: bool = False  # the embedding's gradient by our kernel, with the positions'
    one_pass: bool = True  # attention backward, with 5 matmuls, as for 124M on an H200; else two kernels, with 7
    adamw: bool = False  # AdamW by our kernel, which also writes the weights' bf16 copies
    recompute: bool = False  # blocks forward again in backward


ALL = Options(residual=True, epilogue=True, embedding=True, adamw=True)


class Part(NamedTuple):
    name: str
    group: str  # of a profile
    flops: float
    bytes: float
    our_flops: float
    our_bytes: float


def parts(config: GPTConfig, B: int, T: int, ours: Options = ALL, memory: float = Ceilings.memory) -> list[Part]:
    """What one step of bf16 training does, ideally and as we do it on a device of so much memory."""
    L, C, V = config.n_layer, config.n_embd, config.padded_vocab_size
    M, P = B * T, flops.parameters(config) + (config.padded_vocab_size - config.vocab_size) * C
    W = 12 * L * C * C
    way = 2 * M * C
    stream = way if ours.residual else 2 * way
    forward = 2 if ours.recompute else 1  # passes of a block
    found = []

    def add(name: str, group: str, ideal: tuple[float, float], own: tuple[float, float]) -> None:
        found.append(Part(name, group, *ideal, *own))

    for name, width in (("qkv", 3), ("attention projection", 1), ("fc", 4), ("mlp projection", 4)):
        product = 2 * M * width * C * C * L
        add(name, "matmul", (3 * product, 0), ((2 + forward) * product, 0))
    add("head", "matmul", (6 * M * C * V, 0), (6 * M * C * V, 0))
    scores = 2 * M * T * C * L  # q k^T and p v, half of each: causal
    whole = scores * (1 + min(TILE, T) / T)
    add("attention forward", "attention", (scores, 0), (forward * whole, 0))
    add("attention backward", "attention", (2.5 * scores, 0), ((2.5 if ours.one_pass else 3.5) * whole, 0))
    add("attention's delta", "attention", (0, 2 * way * L), (0, 2 * way * L))
    # forward: x, y read, s, o written; backward: do, s, the stream's gradient read, dx written, dy if it is another
    add("add + LayerNorm forward", "layer norm", (0, 8 * way * L), (0, forward * 2 * L * (2 * stream + 2 * way)))
    dy = 0 if ours.residual else way
    add(
        "LayerNorm backward", "layer norm",
        (0, 4 * way * (2 * L + 1)), (0, (2 * L + 1) * (3 * stream + way + dy) - 2 * stream),
    )  # fmt: skip
    add("first LayerNorm, alone", "layer norm", (0, 0), (0, stream + way))
    add("first LayerNorm's gradient added", "elementwise", (0, 0), (0, 3 * stream))
    gelu = 0 if ours.epilogue else way * L
    add("GELU forward", "gelu", (0, 0), (0, forward * 8 * gelu))
    add("GELU backward", "gelu", (0, 0), (0, 12 * gelu))
    add("bias gradients of the projections", "elementwise", (0, 0), (0, 5 * way * L))
    add("cross-entropy", "cross-entropy", (0, 4 * M * V), (0, 4 * M * V))
    add("head's gradients scaled", "cross-entropy", (0, 0), (0, 2 * way + 8 * V * C))
    chunks = -(-2 * M * V // max(HEAD_BYTES, int(memory) // HEAD_SHARE))
    add("head's dw summed over chunks", "elementwise", (0, 0), (0, (10 * (chunks - 1) + 6) * V * C))
    add("head's dw and the embedding's added", "elementwise", (0, 0), (0, 12 * V * C))
    # ideally with the first LayerNorm: rows read in fp32, x and o written; dx read once, the rows' gradients added
    rows = min(M, V)
    gather = 2 * way + stream
    # for the positions dx is read again; ours then writes zeros and sums, Inductor zeros and atomic additions
    scatter = 2 * stream + 4 * V * C + (4 * rows * C if ours.embedding else 4 * M * C)
    add("embedding", "embedding", (0, 5 * way + 8 * rows * C), (0, gather + scatter))
    copied = W if ours.adamw else 0  # parameters whose bf16 copy AdamW writes, and whose gradient is bf16
    add("AdamW", "optimizer", (0, 30 * P), (0, 28 * P))
    add("gradient norm", "optimizer", (0, 4 * P), (0, 4 * P - 2 * copied))
    add("weights to bf16, gradients back", "copy", (0, 0), (0, 12 * (W - copied) + 6 * V * C))
    return found


def milliseconds(work: float, moved: float, ceilings: Ceilings) -> float:
    return work / ceilings.tflops / 1e9 + moved / ceilings.tb_per_s / 1e9


NEXT = {
    "matmul": "the epilogue's tiles by benchmarks.tune, against cuBLAS; FP8 for the head (4 to 6 ms)",
    "attention": "tiles by benchmarks.tune; TMA in the forward; 64 rows to a tile on the diagonal; specialised warps",
    "layer norm": "rows and stages by benchmarks.tune; the first LayerNorm in the embedding's kernel",
    "gelu": "mlp=epilogue, if its matmuls stay within a few per cent of cuBLAS",
    "cross-entropy": "the head's scale folded into AdamW; block by benchmarks.tune: rows in work must stay in L2",
    "embedding": "positions and tokens from one reading of dx",
    "optimizer": "AdamW's chunk by benchmarks.tune; a bf16 gradient of the head",
    "copy": "the head's weight rounded by AdamW like the others",
    "elementwise": "bias gradients summed where LayerNorm's and attention's backward write them",
    "other": "kernels whose name fits no group: give them one in step_profile.py",
    "device idle": "the whole step as a CUDA graph",
}


class Line(NamedTuple):
    """Of the table; measured is None where there is no profile."""

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
    """A line for each group of kernels, and for each that only the profile knows."""
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
    """Milliseconds by group of a profile's row; what the kernels leave of the step's time is the device idle."""
    return row["groups"] | {"device idle": max(0.0, row["wall_ms"] - row["device_ms"])}


def cells(line: Line) -> list[str]:
    work = [f"{line.flops / 1e12:.2f} TFLOP"] * bool(line.flops) + [f"{line.bytes / 1e9:.2f} GB"] * bool(line.bytes)
    measured = "not measured" if line.measured is None else f"{line.measured:.2f}"
    missing = round(line.missing, 2) + 0.0  # no -0.00
    numbers = [f"{line.floor:.2f}", f"{line.counted:.2f}", measured, f"{missing:.2f}"]
    return [line.group, ", ".join(work) or "-", *numbers, NEXT.get(line.group, "-") if missing > 0 else "-"]


HEAD = ["group", "work", "floor ms", "ours, counted ms", "measured ms", "missing ms", "next thing to try"]


def total(made: Sequence[Line]) -> Line:
    flops, bytes, floor, counted = (sum(column) for column in list(zip(*made))[1:5])
    measured = None if made[0].measured is None else sum(line.measured or 0.0 for line in made)
    return Line("step", flops, bytes, floor, counted, measured)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Aligned, since a terminal shows it too."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    rows = (head, ["-" * width for width in widths], *body)
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows)


def table(made: Sequence[Line]) -> str:
    """The sum last."""
    return markdown(HEAD, [cells(line) for line in (*made, total(made))])


def kinds(found: Sequence[Part], ceilings: Ceilings) -> dict[str, float]:
    """The floor's milliseconds: two groups that multiply, and all that moves."""
    made = {
        group: sum(milliseconds(part.flops, 0, ceilings) for part in found if part.group == group)
        for group in ("matmul", "attention")
    }
    return made | {"memory-bound": sum(milliseconds(0, part.bytes, ceilings) for part in found)}


def split(found: Sequence[Part], ceilings: Ceilings) -> str:
    matmuls, attention, memory = (ms := kinds(found, ceilings)).values()
    return f"floor {sum(ms.values()):.1f} ms = matmuls {matmuls:.1f} + attention {attention:.1f} + memory {memory:.1f}"


def ceilings_of(rows: Iterable[dict]) -> Ceilings | None:
    """What the device of these rows copied and multiplied in the same run; None if they do not say."""
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
    """A profile's row, its floor beside it."""
    shape = SIZES[row["size"]], row["B"], row["T"]
    ours = Options(**row.get("options", {}))
    return lines(parts(*shape, ours, ceilings.memory), ceilings, groups_of(row))


def newest(results: Path, shape: dict) -> tuple[list[dict], Ceilings | None]:
    """Profiles of this shape on the first GPU among the results that has any, and what that GPU can do."""
    for group in groups(results, "profile"):
        if group.gpu and group.config == shape:
            files = sorted((results / group.folder).glob("*.jsonl"))
            return group.rows, ceilings_of(row for path in files for row in rows_of(path))
    return [], None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=SIZES, default="gpt2")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--seq-len", type=int, default=1024)
    p.add_argument("--off", nargs="+", choices=[f.name for f in fields(ALL) if getattr(ALL, f.name)], default=[],
                   help="options of ours")  # fmt: skip
    p.add_argument("--recompute", action="store_true", help="blocks forward again in backward")
    p.add_argument("--profile", type=Path, help="a gpu.jsonl: its profiles, and its ceilings")
    p.add_argument("--tflops", type=float, help="bf16 matmul; the default is the file's, or an H200's 790")
    p.add_argument("--tb-per-s", type=float, help="copy, read + written; the default is the file's, or an H200's 4.3")
    p.add_argument("--parts", action="store_true", help="the parts of each group too")
    return p


def main(argv: Sequence[str], results: Path = harness.RESULTS) -> int:
    options = parser().parse_args(argv)
    for name in ("batch_size", "seq_len", "tflops", "tb_per_s"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be more than 0")
    if options.profile:
        if not options.profile.is_file():
            raise UserError(f"--profile {options.profile} is no file: name the gpu.jsonl that benchmarks.gpu wrote")
        rows = rows_of(options.profile)
        profiles = [row for row in rows if row.get("suite") == "gpu" and "groups" in row]
        seen = ceilings_of(rows)
    else:
        profiles, seen = newest(results, {"size": options.size, "B": options.batch_size, "T": options.seq_len})
    seen = seen or Ceilings()
    ceilings = Ceilings(options.tflops or seen.tflops, options.tb_per_s or seen.tb_per_s, seen.memory)
    on = {f.name: f.name not in options.off for f in fields(Options)} | {"recompute": options.recompute}
    shape = options.size, options.batch_size, options.seq_len
    print(text(shape, profiles, ceilings, Options(**on), options.parts))
    return 0


def text(
    shape: tuple[str, int, int], profiles: Sequence[dict], ceilings: Ceilings, ours: Options = ALL, each: bool = False
) -> str:
    """The tables of these profiles, or of what is counted where there are none."""
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
    """For the README: of GPT-2's own shape."""
    profiles, seen = newest(results, {"size": "gpt2", "B": 64, "T": 1024})
    return text(("gpt2", 64, 1024), profiles, seen or Ceilings())


def parts_table(found: Sequence[Part], ceilings: Ceilings) -> str:
    body = []
    for part in found:
        ideal = milliseconds(part.flops, part.bytes, ceilings)
        own = milliseconds(part.our_flops, part.our_bytes, ceilings)
        body.append([part.name, part.group, f"{ideal:.2f}", f"{own:.2f}"])
    return markdown(["part", "group", "floor ms", "ours, counted ms"], body)


if __name__ == "__main__":
    run_main(main)
