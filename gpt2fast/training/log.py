"""The log of a run: it reads losses from the device, writes them to metrics.jsonl, shows them and reports spikes."""

import math
import time
from collections import deque
from statistics import fmean, median

import torch
from torch import Tensor

from gpt2fast.training import run
from gpt2fast.training.screen import Screen
from gpt2fast.training.session import Session
from gpt2fast.training.skip_limit import SkipLimit, is_skipped

LOG_SECONDS = 1.0  # between reads on CUDA, without --log-every
SUMMARY_STEPS = 20  # the training loss of the summary is their mean
WINDOW = 128


class Spikes:
    """z-scores within the last `WINDOW` finite numbers, the newest included: llm.c's outlier detector.

    It keeps the window and no running sums, so that a resumed run, which fills the window again, gets the same bits.
    """

    def __init__(self):
        self._window: deque[float] = deque(maxlen=WINDOW)

    def z(self, x: float) -> float:
        """Return (x - mean) / standard deviation; NaN until the window is full, and for an x that is not finite, which
        is not added."""
        if not math.isfinite(x):
            return math.nan
        self._window.append(x)
        if len(self._window) < WINDOW:
            return math.nan
        mean = math.fsum(self._window) / WINDOW
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in self._window) / WINDOW)
        return (x - mean) / deviation if deviation else 0.0


class Log:
    """Keep losses and norms on the device, read them together, write and show them.

    `skip_limit` checks each row, and may end the run.
    """

    def __init__(self, s: Session, metrics: run.Metrics | run.NoMetrics, screen: Screen, skip_limit: SkipLimit):
        self.s, self.metrics, self.screen, self.skip_limit = s, metrics, screen, skip_limit
        self.val_loss: float | None = None
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._losses: deque[float] = deque(maxlen=SUMMARY_STEPS)
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._loss_spikes, self._norm_spikes = Spikes(), Spikes()
        self.skipped = 0  # skipped steps of the whole run
        for row in metrics.before:
            if "loss" in row:
                self._z_scores(row)
                self.skipped = row.get("skipped", 0)
        self.start_clock()

    def _z_scores(self, row: dict) -> dict[str, float]:
        """Add a row to the windows and return its z-scores. None, which is null in the file, means not finite."""
        loss, norm = (math.nan if row[name] is None else row[name] for name in ("loss", "grad_norm"))
        return {"loss_z": self._loss_spikes.z(loss), "norm_z": self._norm_spikes.z(norm)}

    def start_clock(self) -> None:
        """Start timing again: the time since the last flush does not count as that of steps."""
        self._start = time.perf_counter()

    def step(self, lr: float, loss: Tensor, norm: Tensor) -> None:
        """Keep the results of a step, and flush when it is time."""
        self._pending.append((self.s.step, lr, loss, norm))
        if self._is_time():
            self.flush()

    def _is_time(self) -> bool:
        every = self.s.config.log_every
        if every is None and self.s.place.device.type == "cuda":
            return time.perf_counter() - self._start >= LOG_SECONDS
        return len(self._pending) >= (every or 1)

    def flush(self) -> None:
        """Read, write and show the results that are kept. RunError if too many steps were skipped.

        This is the only place where the host waits for the device.
        """
        if not self._pending:
            return
        steps, rates, losses, norms = zip(*self._pending)
        losses, norms = torch.stack([torch.stack(losses), torch.stack(norms)]).tolist()
        self._pending = []
        seconds = time.perf_counter() - self._start
        self.s.seconds += seconds
        self._step_seconds.append(seconds / len(steps))
        c = self.s.config
        speed = c.total_batch * len(steps) / seconds
        for step, lr, loss, norm in zip(steps, rates, losses, norms):
            self.skipped += is_skipped(loss, norm)
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": step * c.total_batch}
            row |= {"tokens_per_s": round(speed, 1), "mfu": self.s.mfu(speed), "skipped": self.skipped}
            row |= self._z_scores(row)
            self.metrics.write(row)
            if math.isfinite(loss):
                self._losses.append(loss)
            self._announce(row)
            self.skip_limit.check(row)
        self.screen.step(row, eta=(c.steps - self.s.step) * median(self._step_seconds))
        self.start_clock()

    @property
    def loss(self) -> float | None:
        """Return the mean training loss of the last SUMMARY_STEPS steps; None before the first."""
        return fmean(self._losses) if self._losses else None

    @property
    def speed(self) -> float:
        """Return the median tokens/s of the newest reads."""
        return self.s.config.total_batch / median(self._step_seconds) if self._step_seconds else math.nan

    def _announce(self, row: dict) -> None:
        """Report a step that was skipped, or whose loss is a spike."""
        step, loss, norm = row["step"], row["loss"], row["grad_norm"]
        if is_skipped(loss, norm):
            self.screen.say(f"step {step}: skipped, loss {loss}, norm {norm} ({self.skipped} so far)")
        elif 0 < self.s.config.spike < abs(row["loss_z"]):
            z = f"{row['loss_z']:+.2f} standard deviations from the mean of the last {WINDOW}"
            self.screen.say(f"step {step}: loss {loss:.3f} is a spike, {z}")
