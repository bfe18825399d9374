"""The pictures of docs/results.md: tokens/s as bars, a panel for each configuration of a suite.

A PNG carries a fingerprint of the rows it was drawn from and of its name, not of this source: other rows make it stale,
and neither a formatter nor another version of matplotlib does. After a change of this file that alters a picture,
delete the picture: `python -m benchmarks.report` draws it again.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.rows import Group, Speed, number, reason, speeds, unmeasured

KEY = "Description"  # the text of a PNG that is the fingerprint
REASON = 70  # characters that fit into a panel
WIDTH, DPI = 8, 130  # inches, dots per inch
OURS, OTHERS, GREY, DARK = "#d55e00", "#7d93ab", "#707070", "#333333"


TITLES = {  # by suite, which is also the picture's name
    "ladder": "Training, one rung at a time: tokens/s (20th to 80th percentile), x the first rung",
    "peers": "The same training step by others: tokens/s (lowest to highest run), x the best opponent",
}


def fingerprint(name: str, found: Sequence[Group]) -> str:
    rows = [name, *([group.folder, *group.rows] for group in found)]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def fingerprint_in(path: Path) -> str | None:
    """The fingerprint in a picture, or None if there is no picture or it has none."""
    try:
        with Image.open(path) as image:
            return image.info.get(KEY)
    except OSError:
        return None


def png(name: str, found: Sequence[Group]) -> bytes:
    """The picture with 256 colours: a third of the bytes, and it looks the same."""
    drawn, small, text = io.BytesIO(), io.BytesIO(), PngInfo()
    draw(name, found).savefig(drawn, format="png")
    text.add_text(KEY, fingerprint(name, found))
    Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", pnginfo=text, optimize=True)
    return small.getvalue()


def draw(name: str, found: Sequence[Group]) -> Figure:
    """Horizontal bars, a panel for each group, and a line for each kind of device without one."""
    panels, missing = [(group.title, speeds(name, group.rows)) for group in found], unmeasured(found)
    heights = [0.7 + 0.29 * len(bars) for _, bars in panels] + [0.3] * len(missing)
    figure = Figure(figsize=(WIDTH, 0.5 + sum(heights)), dpi=DPI, layout="constrained")
    figure.suptitle(TITLES[name], fontsize=11, fontweight="bold")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, (title, bars) in zip(axes, panels):
        _panel(each, title, bars)
    for each, sentence in zip(axes[len(panels) :], missing):
        each.axis("off")
        each.text(0.5, 0.5, sentence, ha="center", va="center", fontsize=10, style="italic", color=GREY)
    return figure


def _panel(axes: Axes, title: str, bars: Sequence[Speed]) -> None:
    most = max((bar.high or bar.tokens_per_s or 0.0 for bar in bars), default=0.0) or 1.0
    for y, bar in enumerate(bars):
        if bar.tokens_per_s is None:
            axes.text(0.01 * most, y, reason(bar.last, REASON), va="center", fontsize=8, style="italic", color=GREY)
            continue
        low, high = bar.low or bar.tokens_per_s, bar.high or bar.tokens_per_s
        axes.barh(y, bar.tokens_per_s, height=0.68, color=OURS if bar.ours else OTHERS)
        spread = [[bar.tokens_per_s - low], [high - bar.tokens_per_s]]
        axes.errorbar(bar.tokens_per_s, y, xerr=spread, color=DARK, capsize=2.5, linewidth=1)
        text = number(bar.tokens_per_s) + (f"   {bar.times:.2f} x" if bar.times else "")
        axes.text(high + 0.015 * most, y, text, va="center", fontsize=9, fontweight="bold" if bar.ours else "normal")
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.5 * most)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
