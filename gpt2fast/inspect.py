"""What is in a model, and how its training went: `python -m gpt2fast.inspect out/nano`.

    <out>/<source>/positions.png     three channels of the position embeddings
    <out>/<source>/similarity.png    cosine of each position embedding with each other
    <out>/<source>/tokens.png        norms of the token embeddings, the never-trained marked
    <out>/runs.png                   loss, learning rate, gradient norm, tokens/s of all runs that were named

And, printed, each tensor's shape, mean and standard deviation. All sources are read before anything is written.
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

NO_TEXT = (124, 125, *range(177, 188))  # tokens of the bytes C0, C1 and F5 to FF, which are in no UTF-8
MARGIN = 1.1  # on the distance of these from the centroid of the others: each has been drawn at random
CHANNELS = (150, 200, 250)  # of 768
COLORS = ("#0072B2", "#D55E00", "#009E73")


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
    """A folder's name for each source: its last part; where two are equal, all of it."""
    paths = [Path(source).resolve() for source in sources]
    if len(set(paths)) < len(paths):
        raise UserError("a source is named twice: name each once")
    last = [path.name for path in paths]
    return [
        str(Path(source)).strip("./").replace("/", "_") if last.count(name) > 1 else name
        for source, name in zip(sources, last)
    ]


def run_label(folder: Path, name: str) -> str:
    """A run, and what it was computed with."""
    resolved = read_record(folder)[1]
    chosen = list(resolved["ops"].values())
    most = max(chosen, key=chosen.count)
    others = [f"{op}={name}" for op, name in resolved["ops"].items() if name != most]
    compiled = ["compiled"] if resolved["compile"] else []
    return f"{name}: {', '.join([most, *others, resolved['precision'], *compiled])}"


def tensor_table(weights: Weights) -> str:
    """A line for each tensor; sums are made in float64."""
    rows = [("tensor", "shape", "parameters", "mean", "std")]
    for name, tensor in weights.tensors.items():
        var, mean = torch.var_mean(tensor.double(), correction=0)
        shape = " x ".join(map(str, tensor.shape))
        rows.append((name, shape, f"{tensor.numel():,}", f"{mean:.6f}", f"{var.sqrt():.6f}"))
    rows.append(("total", "", f"{count_parameters(weights):,}", "", ""))
    width = [max(map(len, column)) for column in zip(*rows)]
    sides = "<<>>>"  # names and shapes to the left, numbers to the right
    lines = ("  ".join(f"{text:{side}{w}}" for text, side, w in zip(row, sides, width)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def count_parameters(weights: Weights) -> int:
    """Parameters, the tied head counted once."""
    return sum(tensor.numel() for tensor in weights.tensors.values())


def tied_head(weights: Weights) -> str:
    n, tied = count_parameters(weights), weights.tensors["wte.weight"].numel()
    return (
        f"tied head: wte.weight is the head as well, which saves {tied:,} parameters ({4 * tied / 1e6:,.1f} MB in "
        f"fp32), {100 * tied / n:.0f}% of {n:,}"
    )


def never_trained(weights: Weights, folder: Path | None) -> tuple[np.ndarray | None, str]:
    """The tokens that training never saw, and how that is known: by the run's data, if that is still what it was."""
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
    return found, "by their nearness to tokens that no text has (a guess)"


def draw_positions(wpe: Tensor, name: str) -> "Figure":
    """Three channels of the position embeddings (T, C), over all positions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="value", title=f"Position embeddings of {name}")
    for channel, color in zip(channels(wpe.shape[1]), COLORS):
        axes.plot(wpe[:, channel].numpy(), color=color, linewidth=1.2, label=f"channel {channel}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def channels(width: int) -> list[int]:
    """150, 200 and 250, as often drawn of GPT-2 124M; of a narrower model those at the same share of its width."""
    return [channel * min(width, 768) // 768 for channel in CHANNELS]


def draw_similarity(wpe: Tensor, name: str) -> "Figure":
    """Cosine of each position embedding with each other, as an image (T, T)."""
    from matplotlib.figure import Figure

    unit = wpe / wpe.norm(dim=1, keepdim=True).clamp(min=1e-12)
    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="position", title=f"Position embeddings of {name}")
    image = axes.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, label="cosine similarity")
    return figure


def draw_tokens(wte: Tensor, never: np.ndarray | None, how: str, name: str) -> "Figure":
    """Norm of each token's embedding (V, C), by token, and how many tokens have such a norm. `never` (n,) are the
    never-trained ones, as `how` says; None if that is not known."""
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
        style = {"markersize": 5 if few else 1.5, "zorder": 3 - len(group) / len(norms)}  # the fewer lie on top
        scatter.plot(group, norms[group], "x" if few and i else ".", color=color, label=text, **style)
        counts.hist(norms[group], bins, orientation="horizontal", histtype="step", color=color)
    scatter.set(title=f"Token embeddings of {name}", xlabel="token", ylabel="norm of its embedding", ylim=(0, bins[-1]))
    counts.set(xlabel="tokens", xscale="log")
    scatter.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (scatter, counts):
        axes.grid(alpha=0.3)
    for handle in figure.legend(loc="outside lower center", ncols=2, frameon=False).legend_handles:
        handle.set_markersize(8)  # type: ignore[union-attr]  # lines, of which there are some
    return figure


def guess_never_trained(wte: Tensor) -> np.ndarray | None:
    """Tokens whose embedding (V, C) lies among those of bytes that no text contains; None for another vocabulary.

    The head is the embedding, so each step's softmax pushes the row of every token that is not the answer, also that of
    one which never occurs: all of those in the same direction. They stay together, and what they were drawn as fades by
    weight decay, while a token that occurs is drawn to where it is needed. Bytes that UTF-8 never contains have tokens
    too, 13 of them, which no text can train; so a row that lies no farther from their centroid than they themselves do
    counts as never trained. That is a heuristic, since a rare token may pass for one: in a nano run of 340 steps it
    finds 40,386 of the 40,410 tokens that did not come up, and 691 that came up once or so.
    """
    if len(wte) != VOCAB_SIZE:
        return None
    known = wte[list(NO_TEXT)].double()
    n = len(known)
    own = (known - known.mean(0)).norm(dim=1) * n / (n - 1)  # from the centroid of the others
    distances = (wte.double() - known.mean(0)).norm(dim=1)
    distances[list(NO_TEXT)] = own
    return (distances <= MARGIN * own.max()).nonzero().squeeze(1).numpy()


def write_pictures(figures: dict[Path, "Figure"]) -> None:
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
    c = parse(InspectConfig, argv, "gpt2fast.inspect")
    print("\n\n".join(inspect(c)))


if __name__ == "__main__":
    run_main(main)
