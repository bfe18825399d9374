"""What a person sees: a terminal gets one live line, a log file plain ones; the plot shows the unigram entropy."""

import gc
import os
import pty
import subprocess
import sys
import termios
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from gpt2fast import plot, screen
from gpt2fast.distributed import ALONE
from gpt2fast.train import draw, train

ROW = {"step": 3, "loss": 9.87654, "lr": 6e-4, "grad_norm": 1.2345, "tokens_per_s": 123456.7, "mfu": None}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3725, "1:02:05"), (2 * 86400 + 61, "2d 00:01")],
    ids=str,
)
def test_clock(seconds, text):
    assert screen.clock(seconds) == text


def test_plain_lines_when_the_output_is_no_terminal(capsys):
    with screen.Screen(10, 0) as s:
        s.step(ROW, eta=75)
        s.step(ROW, eta=74)  # too soon for another line
        s.say("an event")
        s.step(ROW | {"step": 10, "mfu": 0.4567}, eta=0)
    assert capsys.readouterr().out.splitlines() == [
        "step  3/10  loss 9.877  lr 6.00e-04  norm 1.23  123,457 tok/s  MFU unknown  ETA 1:15",
        "an event",
        "step 10/10  loss 9.877  lr 6.00e-04  norm 1.23  123,457 tok/s  MFU 45.7%  ETA 0:00",
    ]


def test_one_live_line_in_a_terminal():
    code = f"""
from gpt2fast.screen import Screen
with Screen(10, 0) as s:
    for i in (1, 2):
        s.step({ROW!r} | {{"step": i}}, eta=9)
    s.say("an event")
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 140))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=theirs, env=environment, check=True, timeout=120)
    os.close(theirs)
    output = os.read(ours, 65536).decode()
    os.close(ours)
    assert output.count("\r") > 3  # redrawn in place
    assert "step  2/10  loss 9.877" in output
    assert "an event\r\n" in output


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


def test_a_long_curve_is_drawn_by_its_lowest_and_highest_points():
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


def test_drawing_a_long_run_keeps_two_numbers_of_a_row(tmp_path):
    """All rows at once were what benchmarks.soak saw grow."""

    def most(n: int) -> int:
        rows = ({"step": i, "loss": float(i), "lr": 0.1 * i, "grad_norm": 0.2 * i} for i in range(n))
        plot.loss_curve(rows, tmp_path / "loss.png", "a run", 5.84)
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        few = most(2_000)
        assert most(50_000) - few < 100 * 50_000
    finally:
        tracemalloc.stop()


def test_nothing_is_left_of_a_drawn_figure(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    config, dataset = SimpleNamespace(folder=tmp_path), SimpleNamespace(name="data")
    s = SimpleNamespace(config=config, dataset=dataset, entropy=5.0, world=ALONE)
    gc.disable()  # so that none is collected by chance
    try:
        draw(s)
        assert not [each for each in gc.get_objects() if type(each).__name__ == "Figure"]
    finally:
        gc.enable()


def test_a_run_without_validation_split_says_so(tmp_path, capsys):
    c = tiny.config(tmp_path, steps=2, warmup=1)
    (tmp_path / "data" / "val.bin").unlink()
    assert train(c) == 0
    assert "nothing is validated" in capsys.readouterr().out


def test_tensorboard(tmp_path, capsys):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    c = tiny.config(tmp_path, steps=4, warmup=1, tensorboard=True)
    train(c)
    events = reader.EventAccumulator(str(c.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
