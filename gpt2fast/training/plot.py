"""Curves of training runs: the loss.png of one run, drawn by train, and runs.png, which compares several.

Figures are made without pyplot, so there is no display and no global state. matplotlib is imported where a figure is
made, since that takes half a second.
"""

import io
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2fast.files.atomic import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart, without yellow, which is hard to see on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":", "-.")  # the next one from the 8th run on
SMOOTH = 20  # a curve is averaged over 1/20 of its length
COLUMNS = 1000  # about the width of a picture in pixels
MADE_HERE = {"Software": "gpt2fast"}  # metadata of the PNG files


@dataclass(frozen=True)
class Run:
    """A run to draw: its rows of metrics.jsonl, and the unigram entropy of its data."""

    label: str
    rows: Sequence[dict]
    unigram_entropy: float


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure to a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata=MADE_HERE)
    write_atomic(path, buffer.getvalue())


def loss_curve(rows: Iterable[dict], path: Path, title: str, unigram_entropy: float) -> None:
    """Draw the losses of metrics rows to a PNG file. Two numbers of a row are kept, since a run may have very many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
    curves = {"loss": array("d"), "val_loss": array("d")}
    for row in rows:
        for name, curve in curves.items():
            if row.get(name) is not None:
                curve.extend((row["step"], row[name]))
    train, val = (np.array(curve).reshape(-1, 2) for curve in curves.values())
    if len(train):
        axes.plot(*envelope(train).T, color="tab:blue", linewidth=1, label="training")
    if len(val):
        axes.plot(*val.T, color="tab:orange", marker="o", label="validation")
    _entropy_line(axes, unigram_entropy)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def compare(runs: Sequence[Run]) -> "Figure":
    """Draw loss, learning rate, gradient norm and tokens/s of some runs, each in its colour.

    The x axis is the step, or the tokens if the runs' steps have different sizes. Every run needs a row with a loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    step_tokens = [_step_tokens(run.rows) for run in runs]
    same = len(set(step_tokens)) == 1
    figure = Figure(figsize=(12, 7.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    (loss, rate), (norm, speed) = panels
    for i, (run, tokens) in enumerate(zip(runs, step_tokens)):
        style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}
        scale = 1 if same else tokens
        for axes, name in ((loss, "loss"), (rate, "lr"), (norm, "grad_norm"), (speed, "tokens_per_s")):
            x, y = np.array(series(run.rows, name)).reshape(-1, 2).T
            if name != "lr":
                axes.plot(x * scale, y, color=style["color"], alpha=0.25, linewidth=0.8)
                y = smooth(y)
            axes.plot(x * scale, y, **style, linewidth=1.6, label=run.label if axes is loss else None)
        x, y = np.array(series(run.rows, "val_loss")).reshape(-1, 2).T
        loss.plot(x * scale, y, "o", color=style["color"], markeredgecolor="white", markersize=6, zorder=3)
    for entropy in sorted({round(run.unigram_entropy, 3) for run in runs}):
        _entropy_line(loss, entropy)
    loss.plot([], [], "o", color="gray", label="validation")
    for axes in (loss, norm):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_major_locator(MaxNLocator(9))
    loss.yaxis.set_minor_locator(NullLocator())
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    for axes, title, unit in (
        (loss, "Loss", "nats per token"),
        (rate, "Learning rate", "learning rate"),
        (norm, "Gradient norm, before clipping", "norm"),
        (speed, "Speed", "tokens per second"),
    ):
        axes.set(title=title, ylabel=unit)
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel(f"step of {step_tokens[0]:,.0f} tokens" if same else "tokens seen")
        axes.xaxis.set_major_formatter("{x:,.0f}" if same else EngFormatter(sep=""))  # 10G tokens
    figure.align_ylabels()
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def series(rows: Sequence[dict], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of the rows that have a value. An infinite gradient norm is null in the file: no value."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def envelope(points: np.ndarray) -> np.ndarray:
    """Return the lowest and the highest of (n, 2) points in each of COLUMNS parts.

    A picture shows no more of a long curve, and drawing all of 20,000 steps takes a second and 100 MB at every
    validation.
    """
    if len(points) <= 2 * COLUMNS:
        return points
    found = set()
    for part in np.array_split(np.arange(len(points)), COLUMNS):
        y = points[part, 1]
        found |= {part[y.argmin()], part[y.argmax()]}
    return points[sorted(found)]


def smooth(y: np.ndarray) -> np.ndarray:
    """Return the centred moving average over 1/SMOOTH of the curve; the window shrinks at the ends."""
    half = len(y) // (2 * SMOOTH)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    width = np.minimum(half, np.minimum(i, len(y) - 1 - i))
    return (sums[i + width + 1] - sums[i - width]) / (2 * width + 1)


def _step_tokens(rows: Sequence[dict]) -> float:
    return next(row["tokens"] / row["step"] for row in rows if "tokens" in row)


def _entropy_line(axes: "Axes", entropy: float) -> None:
    label = f"unigram entropy {entropy:.2f}: token frequencies only"
    axes.axhline(entropy, color="gray", linestyle="--", label=label)
