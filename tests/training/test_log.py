"""The z-score of a loss among those before it."""

import math

from gpt2fast.training.log import WINDOW, Spikes


def test_the_window_holds_finite_numbers_only():
    spikes = Spikes()
    found = [spikes.z(float(i % 2)) for i in range(WINDOW)]
    assert all(map(math.isnan, found[:-1]))
    assert found[-1] == 1.0
    assert math.isnan(spikes.z(math.nan))
    assert math.isnan(spikes.z(math.inf))
    assert spikes.z(0.0) == -1.0
    assert Spikes().z(1.0) != Spikes().z(1.0)  # NaN
    flat = Spikes()
    assert [flat.z(2.0) for _ in range(WINDOW)][-1] == 0.0
