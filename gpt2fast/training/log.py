"""The log of a run: losses are read back, written to metrics.jsonl and shown, spikes among them announced."""

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

LOG_SECONDS = 1.0  # on CUDA, unless --log-every says how many steps
SUMMARY_STEPS = 20  # the summary's training loss is the mean of so many steps
WINDOW = 128


class Spikes:
    """z-scores over a window of the newest `WINDOW` finite numbers, itself among them: llm.c's outlier detector.

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


class Log:
    """Keeps losses and norms on the device, reads them back together, writes and shows them.

    `limit` is called with each row that was read back, and may end the run.
    """

    def __init__(self, s: Session, metrics: run.Metrics | run.NoMetrics, screen: Screen, skip_limit: SkipLimit):
        self.s, self.metrics, self.screen, self.skip_limit = s, metrics, screen, skip_limit
        self.val_loss: float | None = None
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._losses: deque[float] = deque(maxlen=SUMMARY_STEPS)
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._loss_spikes, self._norm_spikes = Spikes(), Spikes()
        self.skipped = 0  # steps that were left out, in the whole run
        for row in metrics.before:
            if "loss" in row:
                self._z_scores(row)
                self.skipped = row.get("skipped", 0)
        self.start_clock()

    def _z_scores(self, row: dict) -> dict[str, float]:
        """Of a row that may have been read from a file, where null stands for what is not finite."""
        loss, norm = (math.nan if row[name] is None else row[name] for name in ("loss", "grad_norm"))
        return {"loss_z": self._loss_spikes.z(loss), "norm_z": self._norm_spikes.z(norm)}

    def start_clock(self) -> None:
        """What has passed since the last flush belongs to no step."""
        self._start = time.perf_counter()

    def step(self, lr: float, loss: Tensor, norm: Tensor) -> None:
        self._pending.append((self.s.step, lr, loss, norm))
        if self._is_time():
            self.flush()

    def _is_time(self) -> bool:
        every = self.s.config.log_every
        if every is None and self.s.place.device.type == "cuda":
            return time.perf_counter() - self._start >= LOG_SECONDS
        return len(self._pending) >= (every or 1)

    def flush(self) -> None:
        """The one place where the host waits for the device. RunError where too many steps were left out."""
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
        return fmean(self._losses) if self._losses else None

    @property
    def speed(self) -> float:
        """Median tokens/s."""
        return self.s.config.total_batch / median(self._step_seconds) if self._step_seconds else math.nan

    def _announce(self, row: dict) -> None:
        """Show what is unusual about a step: it was left out, or its loss is a spike."""
        step, loss, norm = row["step"], row["loss"], row["grad_norm"]
        if is_skipped(loss, norm):
            self.screen.say(f"step {step}: left out, loss {loss}, norm {norm} ({self.skipped} so far)")
        elif 0 < self.s.config.spike < abs(row["loss_z"]):
            z = f"{row['loss_z']:+.2f} standard deviations from the mean of the last {WINDOW}"
            self.screen.say(f"step {step}: loss {loss:.3f} is a spike, {z}")
