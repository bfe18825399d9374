"""What is in a model, and how its training went: `python -m gpt2fast.inspect out/nano`.

    <out>/<source>/positions.png     three channels of the position embeddings
    <out>/<source>/similarity.png    cosine of each position embedding with each other
    <out>/<source>/tokens.png        norms of the token embeddings, the never-trained marked
    <out>/runs.png                   loss, learning rate, gradient norm, tokens/s of all runs that were named

And, printed, each tensor's shape, mean and standard deviation. All sources are read before anything is written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpt2fast import checkpoint, config, pictures, plot, pretrained, session
from gpt2fast.errors import RunError, UserError, run_main
from gpt2fast.evaluate import count_all, run_folder
from gpt2fast.plot import Run
from gpt2fast.weights import Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Tables and pictures of models and runs."""

    sources: tuple[str, ...]
    """Runs, for instance out/nano out/other, which are compared; or weights from elsewhere."""
    out: Path = Path("out/inspect")
    """Folder for the pictures; those of an earlier inspection are replaced."""


def inspect(c: InspectConfig) -> list[str]:
    """The tables, a text for each source, and a line for each picture, which it writes. UserError on what is not sound,
    before anything is written."""
    if not c.sources:
        raise UserError("nothing to inspect: name a run, for instance out/nano, or weights")
    texts, runs, figures = [], [], {}
    for source, name in zip(c.sources, names(c.sources)):
        folder = run_folder(source)
        rows = read_rows(folder / "metrics.jsonl") if folder else []
        if folder and any("loss" in row for row in rows):
            runs.append(Run(label(folder, name), rows, config.read_record(folder)[1]["unigram_entropy"]))
        elif folder == Path(source):
            raise UserError(f"{folder}/metrics.jsonl has no row of a training step: let the run take one")
        if folder == Path(source) and not checkpoint.list_checkpoints(folder / "checkpoints"):
            texts.append(f"{folder}: no checkpoint yet, so no weights")
            continue
        weights = pretrained.read(source)
        texts.append(f"{weights.where}\n\n{table(weights)}\n\n{tied_head(weights)}")
        never, how = never_trained(weights, folder)
        wte, wpe = weights.tensors["wte.weight"], weights.tensors["wpe.weight"]
        figures[c.out / name / "positions.png"] = pictures.positions(wpe, name)
        figures[c.out / name / "similarity.png"] = pictures.similarity(wpe, name)
        figures[c.out / name / "tokens.png"] = pictures.tokens(wte, never, how, name)
    if runs:
        figures[c.out / "runs.png"] = plot.compare(runs)
    write(figures)
    return [*texts, "\n".join(f"picture  {path}" for path in figures)]


def names(sources: Sequence[str]) -> list[str]:
    """A folder's name for each source: its last part; where two are equal, all of it."""
    paths = [Path(source).resolve() for source in sources]
    if len(set(paths)) < len(paths):
        raise UserError("a source is named twice: name each once")
    last = [path.name for path in paths]
    return [
        str(Path(source)).strip("./").replace("/", "_") if last.count(name) > 1 else name
        for source, name in zip(sources, last)
    ]


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl. UserError on a damaged line; but a kill may have cut the last one off."""
    rows = []
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines, 1):
        try:
            if line:
                row = json.loads(line)
                if not isinstance(row["step"], int):
                    raise ValueError(f"step is {row['step']!r}")
                rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            if i < len(lines):  # what follows the last newline is not finished
                raise UserError(f"{path}, line {i} is damaged ({type(error).__name__}: {error}): delete it") from None
    return rows


def label(folder: Path, name: str) -> str:
    """A run, and what it was computed with."""
    resolved = config.read_record(folder)[1]
    chosen = list(resolved["ops"].values())
    most = max(chosen, key=chosen.count)
    others = [f"{op}={name}" for op, name in resolved["ops"].items() if name != most]
    compiled = ["compiled"] if resolved["compile"] else []
    return f"{name}: {', '.join([most, *others, resolved['precision'], *compiled])}"


def table(weights: Weights) -> str:
    """A line for each tensor; sums are made in float64."""
    rows = [("tensor", "shape", "parameters", "mean", "std")]
    for name, tensor in weights.tensors.items():
        var, mean = torch.var_mean(tensor.double(), correction=0)
        shape = " x ".join(map(str, tensor.shape))
        rows.append((name, shape, f"{tensor.numel():,}", f"{mean:.6f}", f"{var.sqrt():.6f}"))
    rows.append(("total", "", f"{count(weights):,}", "", ""))
    width = [max(map(len, column)) for column in zip(*rows)]
    sides = "<<>>>"  # names and shapes to the left, numbers to the right
    lines = ("  ".join(f"{text:{side}{w}}" for text, side, w in zip(row, sides, width)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def count(weights: Weights) -> int:
    """Parameters, the tied head counted once."""
    return sum(tensor.numel() for tensor in weights.tensors.values())


def tied_head(weights: Weights) -> str:
    n, tied = count(weights), weights.tensors["wte.weight"].numel()
    return (
        f"tied head: wte.weight is the head as well, which saves {tied:,} parameters ({4 * tied / 1e6:,.1f} MB in "
        f"fp32), {100 * tied / n:.0f}% of {n:,}"
    )


def never_trained(weights: Weights, folder: Path | None) -> tuple[np.ndarray | None, str]:
    """The tokens that training never saw, and how that is known: by the run's data, if that is still what it was."""
    if folder:
        settings, resolved = config.read_record(folder)
        try:
            dataset = session.open_data(settings)
        except UserError:
            dataset = None
        if settings.init_from is None and dataset and dataset.fingerprint == resolved["data_fingerprint"]:
            counts = count_all(dataset.train, weights.config.vocab_size)
            return np.flatnonzero(counts == 0), "not in the training data"
    found = pictures.never_trained(weights.tensors["wte.weight"])
    return found, "by their nearness to tokens that no text has (a guess)"


def write(figures: dict[Path, "Figure"]) -> None:
    """Write the pictures. UserError, before the first is written, if one would replace a file that is none of ours."""
    for path in figures:
        if path.exists() and b"gpt2fast" not in path.read_bytes()[:1024]:
            raise UserError(f"{path} is there already and no picture of ours: choose another folder with --out")
    for path, figure in figures.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            plot.save(figure, path)
        except OSError as error:
            raise RunError(f"cannot write {path} ({error.strerror}): choose another folder with --out") from None


def main(argv: Sequence[str]) -> None:
    import tyro

    c = tyro.cli(
        InspectConfig, args=argv, prog="python -m gpt2fast.inspect", config=(tyro.conf.PositionalRequiredArgs,)
    )
    print("\n\n".join(inspect(c)))


if __name__ == "__main__":
    run_main(main)
