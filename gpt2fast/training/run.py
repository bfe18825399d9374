"""The folder of a run, out/<run>/, and the signals that end a run.

lock             held by the one process that works here; the system frees it, also after kill -9
config.json      settings, what became of "auto", machine, versions, commit, and every resume
metrics.jsonl    a line a step, and a line a validation, HellaSwag score or sample
loss.png         redrawn at every validation and at the end
checkpoints/     weights/checkpoint.py
"""

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from gpt2fast.errors import UserError
from gpt2fast.files.atomic import named, write_atomic


def check_unused(folder: Path) -> None:
    """Raise UserError if `folder` holds anything but a lock. Writes nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder with --out or --run")
    if folder.is_dir() and any(path.name != "lock" for path in folder.iterdir()):
        is_run = (folder / "config.json").exists()
        found = "a run: continue it with --resume, or" if is_run else "other files:"
        raise UserError(f"{folder} already holds {found} choose another name with --run NAME")


def run_folder(source: str | Path) -> Path | None:
    """Return the run folder of `source`, if it is a run or one of its checkpoints; else None."""
    path = Path(source)
    above = path.parents[1] if path.parent.name == "checkpoints" and len(path.parents) > 1 else path
    found = (folder for folder in (path, above) if (folder / "metrics.jsonl").exists())
    return next(found, None)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process did not finish writing or deleting."""
    for parent in (folder, folder / "checkpoints"):
        for path in parent.glob(".*.tmp") if parent.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in parent.glob(".*.deleted") if parent.is_dir() else ():
            shutil.rmtree(path)


def iter_metrics(path: Path) -> Iterator[dict]:
    """Yield the rows of metrics.jsonl, one at a time: a row takes 1.2 KB of memory, and a long run has many.

    No file: no rows. An unfinished last line, which a kill leaves, is dropped. UserError, naming the line, on any other
    line that is not a JSON object with a whole number `step`.
    """
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if type(row["step"]) is not int:
                    raise ValueError(f"step is {row['step']!r}")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{path}, line {number} is damaged ({reason}): delete that line") from None
            yield row


def read_metrics(path: Path) -> list[dict]:
    """Return all rows of metrics.jsonl, as `iter_metrics` yields them."""
    return list(iter_metrics(path))


class Metrics:
    """Context manager that appends rows to metrics.jsonl, and to TensorBoard's files if their folder is given."""

    def __init__(self, path: Path, last_step: int, tensorboard: Path | None = None):
        """Keep the rows up to `last_step` as `before`, and drop the later ones, which a resumed run writes again."""
        self.before = [row for row in read_metrics(path) if row["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.before))
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._writer = _tensorboard_writer()(tensorboard, purge_step=last_step + 1) if tensorboard else None

    def write(self, row: dict) -> None:
        # JSON has no NaN and no infinity, which a skipped step has
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        with named(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._writer:
            for name, value in row.items():
                if name == "sample":
                    self._writer.add_text(name, value, row["step"])
                elif name != "step" and value is not None:
                    self._writer.add_scalar(name, value, row["step"])

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        with named(self._path):
            self._file.close()  # writes again what a full disk refused, and may fail again
        if self._writer:
            self._writer.close()


class NoMetrics:
    """Metrics for ranks other than 0: writes nothing."""

    def __init__(self):
        self.before: list[dict] = []

    def write(self, row: dict) -> None:
        pass

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_) -> None:
        pass


def check_tensorboard() -> None:
    """Raise UserError if TensorBoard is not installed."""
    _tensorboard_writer()


def _tensorboard_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'gpt2fast[tensorboard]'") from None
    return SummaryWriter


class Interrupt:
    """Context manager that records Ctrl-C and SIGTERM instead of ending the process; a second Ctrl-C ends it.

    `signal` is the number that came, or None. The loop checks it between steps, and ends with a checkpoint. Within a
    step it checks `overdue`: a step that is not done `GRACE` seconds after the signal is given up, so that the
    checkpoint of the step before it is written before the sender of the signal resorts to SIGKILL.

    One Ctrl-C may come twice within `ECHO` seconds: from the terminal, which sends it to all its processes, and from
    torchrun. It counts once.
    """

    GRACE = 5.0  # seconds
    ECHO = 1.0
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal: int | None = None
        self._since = 0.0

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def overdue(self) -> bool:
        """Return whether a signal came more than GRACE seconds ago."""
        return self.signal is not None and time.monotonic() - self._since > self.GRACE

    def _remember(self, number: int, _frame) -> None:
        if self.signal == signal.SIGINT == number and time.monotonic() - self._since > self.ECHO:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
