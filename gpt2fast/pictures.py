"""Pictures of a GPT-2's embeddings: what its positions and tokens have become in training.

Never-trained tokens. The head is the embedding, so each step's softmax pushes the row of every token that is not the
answer, also that of one which never occurs: all of those in the same direction. They stay together, and what they were
drawn as fades by weight decay, while a token that occurs is drawn to where it is needed. Where the training data is at
hand, tokens that do not occur in it are the never-trained ones. For other weights they are guessed: bytes that UTF-8
never contains have tokens too, 13 of them, and no text can train these; so a row that lies no farther from their
centroid than they themselves do counts as never trained. That is a heuristic, since a rare token may pass for one: in
a nano run of 340 steps it finds 40,386 of the 40,410 tokens that did not come up, and 691 that came up once or so.
"""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from gpt2fast.model import VOCAB_SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_TEXT = (124, 125, *range(177, 188))  # tokens of the bytes C0, C1 and F5 to FF, which are in no UTF-8
MARGIN = 1.1  # on the distance of these from the centroid of the others: each has been drawn at random
CHANNELS = (150, 200, 250)  # of 768
COLORS = ("#0072B2", "#D55E00", "#009E73")


def positions(wpe: Tensor, name: str) -> "Figure":
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


def similarity(wpe: Tensor, name: str) -> "Figure":
    """Cosine of each position embedding with each other, as an image (T, T)."""
    from matplotlib.figure import Figure

    unit = wpe / wpe.norm(dim=1, keepdim=True).clamp(min=1e-12)
    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="position", title=f"Position embeddings of {name}")
    image = axes.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, label="cosine similarity")
    return figure


def tokens(wte: Tensor, never: np.ndarray | None, how: str, name: str) -> "Figure":
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


def never_trained(wte: Tensor) -> np.ndarray | None:
    """Tokens whose embedding (V, C) lies among those of bytes that are in no text; None for another vocabulary."""
    if len(wte) != VOCAB_SIZE:
        return None
    known = wte[list(NO_TEXT)].double()
    n = len(known)
    own = (known - known.mean(0)).norm(dim=1) * n / (n - 1)  # from the centroid of the others
    distances = (wte.double() - known.mean(0)).norm(dim=1)
    distances[list(NO_TEXT)] = own
    return (distances <= MARGIN * own.max()).nonzero().squeeze(1).numpy()
