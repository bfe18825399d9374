"""loss.png: a run's loss curve, its validations, and the loss that knowing only token frequencies would reach."""

import io
from collections.abc import Sequence
from pathlib import Path

from gpt2fast.files import write_atomic


def loss_curve(rows: Sequence[dict], path: Path, title: str, unigram_entropy: float) -> None:
    """Draw metrics rows to a PNG file."""
    from matplotlib.figure import Figure  # here: it takes half a second; no pyplot, so no display and no global state

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    val = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
    if train:
        axes.plot(*zip(*train), color="tab:blue", linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val), color="tab:orange", marker="o", label="validation")
    axes.axhline(
        unigram_entropy,
        color="gray",
        linestyle="--",
        label=f"unigram entropy {unigram_entropy:.2f}: token frequencies only",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
