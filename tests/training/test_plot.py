"""Curves: the loss.png of a run, and several runs in one figure, checked by the data in the figures."""

import gc
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2fast.machine.world import ALONE
from gpt2fast.train import draw_loss_curve
from gpt2fast.training import plot
from gpt2fast.training.plot import Run


def test_the_plot_has_both_curves_and_the_entropy(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **options: drawn.append((y, options["label"])))
    rows = [
        {"step": 1, "loss": 10.8},
        {"step": 2, "loss": 7.0},
        {"step": 2, "val_loss": 7.5},
        {"step": 2, "sample": "a"},
    ]
    plot.loss_curve(rows, tmp_path / "loss.png", "a run", 5.84)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [(5.84, "unigram entropy 5.84: token frequencies only")]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_long_curve_keeps_its_lowest_and_highest_points():
    points = np.array([(i, i % 7) for i in range(20000)], dtype=float)
    points[12345, 1] = 99.0
    found = plot.envelope(points)
    assert len(found) <= 2 * plot.COLUMNS
    assert (np.diff(found[:, 0]) > 0).all()
    assert (found == points[found[:, 0].astype(int)]).all()
    assert found[found[:, 0] == 12345, 1] == 99.0
    assert set(found[:, 1]) == {0.0, 6.0, 99.0}
    assert plot.envelope(points[:2000]) is not points
    assert (plot.envelope(points[:2000]) == points[:2000]).all()


def test_drawing_keeps_two_numbers_of_a_row_in_memory(tmp_path):
    """Keeping whole rows was a leak that tests.long.soak found."""

    def peak_memory(n: int) -> int:
        rows = ({"step": i, "loss": float(i), "lr": 0.1 * i, "grad_norm": 0.2 * i} for i in range(n))
        plot.loss_curve(rows, tmp_path / "loss.png", "a run", 5.84)
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        few = peak_memory(2_000)
        assert peak_memory(50_000) - few < 100 * 50_000
    finally:
        tracemalloc.stop()


def test_a_drawn_figure_is_freed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    config, dataset = SimpleNamespace(folder=tmp_path), SimpleNamespace(name="data")
    s = SimpleNamespace(config=config, inputs=SimpleNamespace(dataset=dataset, entropy=5.0), world=ALONE)
    gc.disable()  # so that no figure is collected by chance
    try:
        draw_loss_curve(s)
        assert not [each for each in gc.get_objects() if type(each).__name__ == "Figure"]
    finally:
        gc.enable()


ROWS = [
    {"step": i, "loss": 10 - i, "lr": 1e-3 * i, "grad_norm": 1.0 + i, "tokens": 32 * i, "tokens_per_s": 100.0 * i}
    for i in range(1, 5)
] + [{"step": 2, "val_loss": 7.5}, {"step": 4, "val_loss": 6.5}, {"step": 4, "sample": "text"}]


def curves(axes):
    """Return (label, x, y) of each line."""
    return [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_four_panels_show_the_metrics():
    loss, rate, norm, speed = plot.compare([Run("a: torch, bf16", ROWS, 5.5)]).axes
    steps = [1, 2, 3, 4]
    for axes, name in ((loss, "loss"), (norm, "grad_norm"), (speed, "tokens_per_s")):
        for _, x, y in curves(axes)[:2]:  # the raw and the smoothed curve, equal for four values
            assert (x, y) == (steps, [row[name] for row in ROWS[:4]])
    assert curves(rate)[0][1:] == (steps, [row["lr"] for row in ROWS[:4]])
    labels = {label: (x, y) for label, x, y in curves(loss)}
    assert labels["unigram entropy 5.50: token frequencies only"][1] == [5.5, 5.5]
    assert "a: torch, bf16" in labels
    assert curves(loss)[2][1:] == ([2, 4], [7.5, 6.5])
    assert norm.get_xlabel() == speed.get_xlabel() == "step of 32 tokens"
    assert (loss.get_yscale(), norm.get_yscale(), speed.get_ylim()[0]) == ("log", "log", 0)


def test_runs_with_steps_of_other_sizes_are_compared_by_tokens():
    double = [row | {"tokens": 2 * row["tokens"]} if "tokens" in row else row for row in ROWS]
    runs = [Run("a", ROWS, 5.5), Run("b", double, 5.5), *(Run(f"c{i}", ROWS, 6.0) for i in range(6))]
    loss, _, _, speed = plot.compare(runs).axes
    lines = {line.get_label(): line for line in loss.get_lines()}
    assert lines["a"].get_xdata().tolist() == [32, 64, 96, 128]
    assert lines["b"].get_xdata().tolist() == [64, 128, 192, 256]
    assert [64, 128] in [x for _, x, y in curves(loss) if y == [7.5, 6.5]]
    assert [128, 256] in [x for _, x, y in curves(loss) if y == [7.5, 6.5]]
    assert speed.get_xlabel() == "tokens seen"
    assert len({(lines[run.label].get_color(), lines[run.label].get_linestyle()) for run in runs}) == 8
    assert len([label for label in lines if label.startswith("unigram")]) == 2


def test_an_infinite_norm_is_not_drawn():
    rows = [ROWS[0], ROWS[1] | {"grad_norm": None}, ROWS[2]]
    norm = plot.compare([Run("a", rows, 5.5)]).axes[2]
    assert curves(norm)[0][1] == [1, 3]


def test_smoothing_is_a_moving_average():
    y = np.random.default_rng(0).normal(size=207)
    half = 207 // 40
    for i, value in enumerate(plot.smooth(y)):
        width = min(half, i, 206 - i)
        assert value == pytest.approx(y[i - width : i + width + 1].mean())
