"""Show what is in a model, and how its training went: `python -m gpt2fast.inspect out/nano`.

    <out>/<source>/positions.png     three channels of the position embeddings
    <out>/<source>/similarity.png    cosine similarity of the position embeddings
    <out>/<source>/tokens.png        norms of the token embeddings, with never-trained tokens marked
    <out>/runs.png                   loss, learning rate, gradient norm and tokens/s of all named runs

It prints each tensor's shape, mean and standard deviation. All sources are read before anything is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpt2fast.command import parse, run_main
from gpt2fast.data.dataset import count_all, open_data
from gpt2fast.errors import RunError, UserError
from gpt2fast.model import VOCAB_SIZE
from gpt2fast.training import plot
from gpt2fast.training.plot import Run
from gpt2fast.training.record import read_record
from gpt2fast.training.run import read_metrics, run_folder
from gpt2fast.weights import checkpoint
from gpt2fast.weights.foreign import Weights
from gpt2fast.weights.load import read_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_TEXT = (124, 125, *range(177, 188))  # tokens of the bytes C0, C1 and F5 to FF, which UTF-8 never contains
MARGIN = 1.1  # factor on the largest distance of one of these from the centroid of the others
CHANNELS = (150, 200, 250)  # of a width of 768
COLORS = ("#0072B2", "#D55E00", "#009E73")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Print tables and draw pictures of models and runs."""

    sources: tuple[str, ...]
    """Runs to compare, for instance out/nano out/other, or any weights that gpt2fast reads."""
    out: Path = Path("out/inspect")
    """Folder for the pictures; earlier pictures there are replaced."""


def inspect(c: InspectConfig) -> list[str]:
    """Write the pictures. Return the tables, a text for each source, and a line for each picture.

    UserError if a source cannot be read, before anything is written; RunError if a picture cannot be written.
    """
    if not c.sources:
        raise UserError("nothing to inspect: name a run, for instance out/nano, or weights")
    texts, runs, figures = [], [], {}
    for source, name in zip(c.sources, folder_names(c.sources)):
        folder = run_folder(source)
        rows = read_metrics(folder / "metrics.jsonl") if folder else []
        if folder and any("loss" in row for row in rows):
            runs.append(Run(run_label(folder, name), rows, read_record(folder)[1]["unigram_entropy"]))
        elif folder == Path(source):
            raise UserError(f"{folder}/metrics.jsonl has no row of a training step: let the run take one")
        if folder == Path(source) and not checkpoint.list_checkpoints(folder / "checkpoints"):
            texts.append(f"{folder}: no checkpoint yet, so no weights")
            continue
        weights = read_weights(source)
        texts.append(f"{weights.where}\n\n{tensor_table(weights)}\n\n{tied_head(weights)}")
        never, how = never_trained(weights, folder)
        wte, wpe = weights.tensors["wte.weight"], weights.tensors["wpe.weight"]
        figures[c.out / name / "positions.png"] = draw_positions(wpe, name)
        figures[c.out / name / "similarity.png"] = draw_similarity(wpe, name)
        figures[c.out / name / "tokens.png"] = draw_tokens(wte, never, how, name)
    if runs:
        figures[c.out / "runs.png"] = plot.compare(runs)
    write_pictures(figures)
    return [*texts, "\n".join(f"picture  {path}" for path in figures)]


def folder_names(sources: Sequence[str]) -> list[str]:
    """Return a folder name for each source: its last part, or all of it where two last parts are equal."""
    paths = [Path(source).resolve() for source in sources]
    if len(set(paths)) < len(paths):
        raise UserError("a source is named twice: name each once")
    last = [path.name for path in paths]
    return [
        str(Path(source)).strip("./").replace("/", "_") if last.count(name) > 1 else name
        for source, name in zip(sources, last)
    ]


def run_label(folder: Path, name: str) -> str:
    """Return the name of a run, with its ops, precision and compilation."""
    resolved = read_record(folder)[1]
    chosen = list(resolved["ops"].values())
    most = max(chosen, key=chosen.count)
    others = [f"{op}={name}" for op, name in resolved["ops"].items() if name != most]
    compiled = ["compiled"] if resolved["compile"] else []
    return f"{name}: {', '.join([most, *others, resolved['precision'], *compiled])}"


def tensor_table(weights: Weights) -> str:
    """Return the table of the tensors, a line for each. Mean and standard deviation are computed in float64."""
    rows = [("tensor", "shape", "parameters", "mean", "std")]
    for name, tensor in weights.tensors.items():
        var, mean = torch.var_mean(tensor.double(), correction=0)
        shape = " x ".join(map(str, tensor.shape))
        rows.append((name, shape, f"{tensor.numel():,}", f"{mean:.6f}", f"{var.sqrt():.6f}"))
    rows.append(("total", "", f"{count_parameters(weights):,}", "", ""))
    width = [max(map(len, column)) for column in zip(*rows)]
    sides = "<<>>>"  # names and shapes are aligned to the left, numbers to the right
    lines = ("  ".join(f"{text:{side}{w}}" for text, side, w in zip(row, sides, width)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def count_parameters(weights: Weights) -> int:
    """Count the parameters, the tied head once."""
    return sum(tensor.numel() for tensor in weights.tensors.values())


def tied_head(weights: Weights) -> str:
    """Return a line that says what tying the head to wte saves."""
    n, tied = count_parameters(weights), weights.tensors["wte.weight"].numel()
    return (
        f"tied head: wte.weight is also the head, which saves {tied:,} parameters ({4 * tied / 1e6:,.1f} MB in "
        f"fp32), {100 * tied / n:.0f}% of {n:,}"
    )


def never_trained(weights: Weights, folder: Path | None) -> tuple[np.ndarray | None, str]:
    """Return the tokens that training never saw, (n,) int64, and how they were found: from the run's data if it is
    unchanged, else by a guess. None if the vocabulary is not GPT-2's and the data is unknown.
    """
    if folder:
        settings, resolved = read_record(folder)
        try:
            dataset = open_data(settings.data, settings.model.vocab_size, settings.tokenizer_file)
        except UserError:
            dataset = None
        if settings.init_from is None and dataset and dataset.fingerprint == resolved["data_fingerprint"]:
            counts = count_all(dataset.train, weights.config.vocab_size)
            return np.flatnonzero(counts == 0), "not in the training data"
    found = guess_never_trained(weights.tensors["wte.weight"])
    return found, "near tokens that no text contains (a guess)"


def draw_positions(wpe: Tensor, name: str) -> "Figure":
    """Draw three channels of the position embeddings (T, C) over all positions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="value", title=f"Position embeddings of {name}")
    for channel, color in zip(channels(wpe.shape[1]), COLORS):
        axes.plot(wpe[:, channel].numpy(), color=color, linewidth=1.2, label=f"channel {channel}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def channels(width: int) -> list[int]:
    """Return channels 150, 200 and 250, as often drawn for GPT-2 124M; for a narrower model, in proportion."""
    return [channel * min(width, 768) // 768 for channel in CHANNELS]


def draw_similarity(wpe: Tensor, name: str) -> "Figure":
    """Draw the cosine similarity of the position embeddings (T, C) as an image (T, T)."""
    from matplotlib.figure import Figure

    unit = wpe / wpe.norm(dim=1, keepdim=True).clamp(min=1e-12)
    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="position", title=f"Position embeddings of {name}")
    image = axes.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, label="cosine similarity")
    return figure


def draw_tokens(wte: Tensor, never: np.ndarray | None, how: str, name: str) -> "Figure":
    """Draw the norm of each token's embedding (V, C), and a histogram of the norms.

    `never` (n,) are the never-trained tokens, None if unknown; `how` says how they were found.
    """
    from matplotlib.figure import Figure

    norms = wte.norm(dim=1).numpy()
    never = np.empty(0, np.int64) if never is None else never
    rest = np.delete(np.arange(len(norms)), never)
    groups = [
        (rest, COLORS[0], f"{len(rest):,} other tokens"),
        (never, COLORS[1], f"{len(never):,} never trained: {how}"),
    ]
    groups = [group for group in groups if len(group[0])]
    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    scatter, counts = figure.subplots(1, 2, sharey=True, width_ratios=[5, 1])
    bins = np.linspace(0, 1.05 * norms.max(), 100)
    for i, (group, color, text) in enumerate(groups):
        few = len(group) < len(norms) / 20
        style = {"markersize": 5 if few else 1.5, "zorder": 3 - len(group) / len(norms)}  # the smaller is on top
        scatter.plot(group, norms[group], "x" if few and i else ".", color=color, label=text, **style)
        counts.hist(norms[group], bins, orientation="horizontal", histtype="step", color=color)
    scatter.set(title=f"Token embeddings of {name}", xlabel="token", ylabel="norm of its embedding", ylim=(0, bins[-1]))
    counts.set(xlabel="tokens", xscale="log")
    scatter.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (scatter, counts):
        axes.grid(alpha=0.3)
    for handle in figure.legend(loc="outside lower center", ncols=2, frameon=False).legend_handles:
        handle.set_markersize(8)  # type: ignore[union-attr]  # lines, which have markers
    return figure


def guess_never_trained(wte: Tensor) -> np.ndarray | None:
    """Return the tokens, (n,) int64, whose embedding in `wte` (V, C) is near those of bytes that no text contains.

    None unless V is GPT-2's vocabulary. The head is the embedding, so each step's softmax pushes away the row of every
    token that is not the target. The rows of tokens that never occur are all pushed in the same direction: they stay
    together while weight decay shrinks their initial values, and a token that occurs is pulled elsewhere. UTF-8 never
    contains 13 bytes, whose tokens no text can train; so a row that is not farther from their centroid than they are
    counts as never trained. This is a heuristic, since a rare token may look the same: in a nano run of 340 steps it
    finds 40,386 of the 40,410 tokens that did not occur, and 691 that occurred about once.
    """
    if len(wte) != VOCAB_SIZE:
        return None
    known = wte[list(NO_TEXT)].double()
    n = len(known)
    own = (known - known.mean(0)).norm(dim=1) * n / (n - 1)  # distance from the centroid of the other n - 1
    distances = (wte.double() - known.mean(0)).norm(dim=1)
    distances[list(NO_TEXT)] = own
    return (distances <= MARGIN * own.max()).nonzero().squeeze(1).numpy()


def write_pictures(figures: dict[Path, "Figure"]) -> None:
    """Write the pictures. UserError, before the first is written, if one would replace a file that is not ours."""
    for path in figures:
        if path.exists() and b"gpt2fast" not in path.read_bytes()[:1024]:
            raise UserError(f"{path} exists and is not our picture: choose another folder with --out")
    for path, figure in figures.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            plot.save_figure(figure, path)
        except OSError as error:
            raise RunError(f"cannot write {path} ({error.strerror}): choose another folder with --out") from None


def main(argv: Sequence[str]) -> None:
    c = parse(InspectConfig, argv, "gpt2fast.inspect")
    print("\n\n".join(inspect(c)))


if __name__ == "__main__":
    run_main(main)
