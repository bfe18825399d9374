"""Plots say what is missing."""

import pytest

from benchmarks import plots


@pytest.mark.parametrize("name", plots.PLOTS)
def test_unmeasured_is_drawn_as_unmeasured(name, tmp_path):
    plot = plots.PLOTS[name]
    figure = plot.draw(plot.data(tmp_path))
    words = [text.get_text() for axes in figure.axes for text in axes.texts] + [
        text.get_text() for text in figure.texts
    ]
    assert any("ot measured" in text for text in words), words
