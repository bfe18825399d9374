"""How unusual a number is among the newest ones: llm.c's outlier detector, which tells a loss spike from noise."""

import math
from collections import deque

WINDOW = 128


class Spikes:
    """z-scores over a window of the newest `WINDOW` finite numbers, the one that is judged among them.

    Nothing but the window is kept, no running sums: so a resumed run, which fills it again, finds the same bits.
    """

    def __init__(self):
        self._window: deque[float] = deque(maxlen=WINDOW)

    def z(self, x: float) -> float:
        """(x - mean) / standard deviation; NaN until the window is full, and where x is not finite and stays out."""
        if not math.isfinite(x):
            return math.nan
        self._window.append(x)
        if len(self._window) < WINDOW:
            return math.nan
        mean = math.fsum(self._window) / WINDOW
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in self._window) / WINDOW)
        return (x - mean) / deviation if deviation else 0.0
