"""How the pictures of benchmarks.plots are drawn, from exactly what they show."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.rows import UNMEASURED, number

WIDTH, DPI = 8, 130  # inches, dots per inch
OURS, OTHERS, GREY = "#d55e00", "#7d93ab", "#707070"

PROVIDERS = {  # of kernels: colour and marker
    "triton": (OURS, "o"),
    "eager": ("#999999", "s"),
    "compile": ("#0072b2", "^"),
    "sdpa flash": ("#009e73", "v"),
    "sdpa cudnn": ("#cc79a7", "D"),
    "sdpa efficient": ("#b8a000", "P"),
    "liger": ("#56b4e9", "X"),
}
OTHER_PROVIDER = ("black", "*")
BACKENDS = ("torch", "triton")

GROUP_COLOURS = {  # of a step's kernels, in the order of the bar: what multiplies first, then what moves memory
    "matmul": "#34618e",
    "attention": "#e08a2e",
    "memory-bound": "#8fb996",
    "cross-entropy": "#4c956c",
    "layer norm": "#7ab87f",
    "gelu": "#a9d18e",
    "optimizer": "#c9a0dc",
    "embedding": "#9e7bb5",
    "copy": "#c4b7a6",
    "elementwise": "#dccfb8",
    "other": "#b0b0b0",
    "device idle": "#f0f0f0",
}


def ladder(data: dict) -> Figure:
    def note(bar: dict, bars: Sequence[dict]) -> str:
        return f"{bar['tokens_per_s'] / next(b['tokens_per_s'] for b in bars if not b['why']):.2f} x"

    return _panels(data, "Training, one rung at a time: tokens/s (20th to 80th percentile), x the first rung", note)


def peers(data: dict) -> Figure:
    def note(bar: dict, bars: Sequence[dict]) -> str:
        return f"{bar['times']:.2f} x the best opponent" if bar["ours"] and bar["times"] else ""

    return _panels(data, "The same training step by others: tokens/s (lowest to highest run)", note)


def _panels(data: dict, title: str, note: Callable[[dict, Sequence[dict]], str]) -> Figure:
    """Horizontal bars, a panel for each configuration; what has no panel is said in one line each."""
    heights = [0.7 + 0.29 * len(panel["bars"]) for panel in data["panels"]]
    figure = Figure(figsize=(WIDTH, 0.5 + sum(heights) + 0.35 * len(data["missing"])), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    grid = figure.add_gridspec(
        len(heights) + len(data["missing"]), 1, height_ratios=heights + [0.3] * len(data["missing"])
    )
    for i, panel in enumerate(data["panels"]):
        _bars(figure.add_subplot(grid[i]), panel, note)
    for i, kind in enumerate(data["missing"], len(heights)):
        _unmeasured(figure.add_subplot(grid[i]), kind)
    return figure


def _bars(axes: Axes, panel: dict, note: Callable[[dict, Sequence[dict]], str]) -> None:
    bars = panel["bars"]
    most = max((bar["high"] for bar in bars if not bar["why"]), default=1.0)
    for y, bar in enumerate(bars):
        if bar["why"]:
            axes.text(0.01 * most, y, bar["why"], va="center", fontsize=8, style="italic", color=GREY)
            continue
        speed, low, high = bar["tokens_per_s"], bar["low"], bar["high"]
        axes.barh(y, speed, height=0.68, color=OURS if bar["ours"] else OTHERS)
        axes.errorbar(speed, y, xerr=[[speed - low], [high - speed]], color="#333333", capsize=2.5, linewidth=1)
        weight = "bold" if bar["ours"] else "normal"
        text = "   ".join(filter(None, [number(speed), note(bar, bars)]))
        axes.text(high + 0.015 * most, y, text, va="center", fontsize=9, fontweight=weight)
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.75 * most)
    _plain(axes, panel["title"])


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _unmeasured(axes: Axes, kind: str) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, UNMEASURED.format(kind), ha="center", va="center", fontsize=10, style="italic", color=GREY)


def roofline(data: list) -> Figure:
    """A panel for each op: work on x, rate on y, the device's measured ceiling dashed."""
    figure = Figure(figsize=(WIDTH, 4.8 * len(data) if data else 1.2), dpi=DPI, layout="constrained")
    if not data:
        figure.suptitle("The kernels against the measured ceilings", fontsize=11, fontweight="bold")
        _unmeasured(figure.add_subplot(), "GPU")
        return figure
    for part, gpu in zip(figure.subfigures(len(data), 1, squeeze=False)[:, 0], data):
        ceilings = gpu["ceilings"]["gb_per_s"] / 1e3, gpu["ceilings"]["tflops"]
        measured = f"copies {number(ceilings[0])} TB/s, multiplies {number(ceilings[1])} TFLOP/s (dashed)"
        part.suptitle(f"The kernels on {gpu['device']}, bf16: {measured}", fontsize=11, fontweight="bold")
        cells = part.subplots(-(-(len(gpu["ops"]) + 1) // 4), 4, squeeze=False).ravel()
        for axes, (op, found) in zip(cells, gpu["ops"].items()):
            _roof(axes, op, found, ceilings[found["multiplies"]])
        rest = cells[len(gpu["ops"]) :]
        for axes in rest:
            axes.axis("off")
        _legend(rest[0], {point["provider"] for found in gpu["ops"].values() for point in found["points"]})
    return figure


def _roof(axes: Axes, op: str, found: dict, ceiling: float) -> None:
    for point in sorted(found["points"], key=lambda point: point["provider"] == "triton"):  # ours on top
        colour, marker = PROVIDERS.get(point["provider"], OTHER_PROVIDER)
        face = colour if point["direction"] == "forward" else "white"
        axes.plot(point["work"], point["rate"], marker, color=colour, markerfacecolor=face, markersize=5)
    axes.axhline(ceiling, color="#333333", linestyle="--", linewidth=1)
    axes.set_title(op, fontsize=9)
    axes.set_xscale("log")
    works = [point["work"] for point in found["points"]]
    least, most = min(works) / 1.5, max(works) * 1.5
    axes.set_xlim(least, most)
    axes.set_ylim(0, 1.12 * max(ceiling, *(point["rate"] for point in found["points"])))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 40 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("TFLOP" if found["multiplies"] else "GB moved", fontsize=8)
    axes.set_ylabel("TFLOP/s" if found["multiplies"] else "TB/s", fontsize=8)
    axes.grid(alpha=0.25)


def _legend(axes: Axes, providers: set[str]) -> None:
    known = [name for name in PROVIDERS if name in providers]
    names = known + sorted(providers - set(known))
    styles = [(name, *PROVIDERS.get(name, OTHER_PROVIDER)) for name in names]
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="", label="ours" if n == "triton" else n) for n, c, m in styles
    ]
    for label, face in (("forward", GREY), ("forward + backward", "white")):
        handles.append(Line2D([], [], color=GREY, markerfacecolor=face, marker="o", linestyle="", label=label))
    axes.legend(handles=handles, loc="center", fontsize=8, frameon=False)


def step(data: dict) -> Figure:
    bars = [([("floor", panel["floor"])] if panel["floor"] else []) + _steps(panel) for panel in data["panels"]]
    heights = [0.75 + 0.5 * len(each) for each in bars]
    figure = Figure(figsize=(WIDTH, 1.1 + sum(heights)), dpi=DPI, layout="constrained")
    figure.suptitle("One training step's milliseconds by group of kernels", fontsize=11, fontweight="bold")
    for panel, each, axes in zip(
        data["panels"], bars, figure.subplots(len(bars), 1, squeeze=False, height_ratios=heights)[:, 0]
    ):
        _stack(axes, panel["title"], each)
    shown = {group for each in bars for _, groups in each for group in groups or {}}
    handles = [
        Line2D([], [], color=colour, marker="s", markersize=8, linestyle="", label=group, markeredgecolor="#888888")
        for group, colour in GROUP_COLOURS.items()
        if group in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def _steps(panel: dict) -> list[tuple[str, dict | None]]:
    """The backends' bars, one without numbers where there are none."""
    return [(name, panel["steps"].get(name)) for name in dict.fromkeys([*BACKENDS, *panel["steps"]])]


def _stack(axes: Axes, title: str, bars: Sequence[tuple[str, dict | None]]) -> None:
    most = max((sum(groups.values()) for _, groups in bars if groups), default=1.0)
    for y, (_, groups) in enumerate(bars):
        if groups is None:
            axes.text(0.01 * most, y, UNMEASURED.format("GPU"), va="center", fontsize=9, style="italic", color=GREY)
            continue
        left = 0.0
        for group in [*GROUP_COLOURS, *(name for name in groups if name not in GROUP_COLOURS)]:
            ms = groups.get(group, 0.0)
            axes.barh(
                y,
                ms,
                left=left,
                height=0.66,
                color=GROUP_COLOURS.get(group, "#b0b0b0"),
                edgecolor="white",
                linewidth=0.5,
            )
            if ms > 0.045 * most:
                dark = group in ("matmul", "cross-entropy")
                axes.text(
                    left + ms / 2,
                    y,
                    f"{ms:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
            left += ms
        axes.text(left + 0.01 * most, y, f"{left:.1f} ms", va="center", fontsize=9, fontweight="bold")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * most)
    _plain(axes, title)
