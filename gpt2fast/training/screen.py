"""What a run prints: a header, a live line with events above it, a summary. In a log file all lines are plain."""

import math
import sys
import time

from tqdm import tqdm

from gpt2fast.model import parameter_count
from gpt2fast.training.session import Session

FIRST_LOSS_TOLERANCE = 0.5  # an untrained GPT-2 has 10.8 (nano) to 11.2 (gpt2-xl); uniform guesses have 10.82


def header(s: Session, source: str) -> str:
    """Return what is printed before the first step."""
    c, m = s.config, s.config.model
    n, tied = parameter_count(s.model), m.vocab_size * m.n_embd
    epoch = s.inputs.train.batches_per_epoch * c.batch_size * c.seq_len
    dataset, choices = s.inputs.dataset, s.choices
    train, val = (sum(map(len, shards)) for shards in (dataset.train, dataset.val))
    ranks = f"{s.world.size} processes x " if s.world.size > 1 else ""
    expected = math.log(m.vocab_size)
    untrained = not s.step and c.init_from is None
    text = _aligned({
        "run": f"{c.folder}, {source}" + (f", from step {s.step}" if s.step else ""),
        **({"weights": f"started from {c.init_from}"} if c.init_from else {}),
        "device": f"{choices.device_name} ({choices.device})",
        "precision": choices.words(),
        "ops": _ops_text(vars(choices.ops), choices.auto),
        "model": f"{m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, block {m.block_size}: {n:,} parameters",
        "tied head": f"one matrix for embedding and head saves {tied:,} parameters, {100 * tied / n:.0f}% of {n:,}",
        "data": f"{c.data} ({dataset.fingerprint}): {train:,} training tokens, {val:,} for validation",
        "entropy": f"{s.inputs.entropy:.3f} nats, the loss of a model that knows only token frequencies",
        "step": f"{c.total_batch:,} tokens = {ranks}{s.accumulation} x B {c.batch_size} x T {c.seq_len}",
        "steps": f"{c.steps:,} = {c.steps * c.total_batch:,} tokens, {c.steps * c.total_batch / epoch:.2f} epochs",
        "first loss": f"{s.first_loss:.3f}" + (f" (ln {m.vocab_size} = {expected:.2f})" if untrained else ""),
        "expected": f"{clock(s.expected_seconds)} for {c.steps - s.step:,} steps",
    })  # fmt: skip
    if c.val_every and not s.inputs.val:
        text += "\nnote: the data has no validation split as long as one sequence, so there is no validation"
    if untrained and abs(s.first_loss - expected) > FIRST_LOSS_TOLERANCE:
        text += (
            f"\nwarning: the loss of an untrained model should be about {expected:.2f}, and it is {s.first_loss:.2f}: "
            "check weights, inputs and targets"
        )
    return text


def summary(s: Session, loss: float | None, val_loss: float | None, speed: float) -> str:
    """Return what is printed after the last step: the results, and the command to continue with."""
    c = s.config
    losses = [
        f"{value:.3f} {name}" for name, value in (("training", loss), ("validation", val_loss)) if value is not None
    ]
    done = s.step == c.steps
    return _aligned({
        "trained": f"{s.step:,} of {c.steps:,} steps, {s.step * c.total_batch:,} tokens, {clock(s.seconds)}",
        "speed": f"{speed:,.0f} tokens/s, MFU {percent(s.mfu(speed))}",
        "loss": f"{', '.join(losses) or 'no step was taken'}; unigram entropy {s.inputs.entropy:.3f}",
        "files": f"{c.folder}: loss.png, metrics.jsonl, config.json, checkpoints/step_{s.step:08d}",
        "next": f'python -m gpt2fast.sample {c.folder} --prompt "{c.prompt}"' if done
        else f"python -m gpt2fast.train --resume --out {c.out} --run {c.folder.name}",
    })  # fmt: skip


class Screen:
    """Context manager that shows steps: in a terminal as one line that is redrawn, else as a line every few seconds."""

    PLAIN_SECONDS = 5.0

    def __init__(self, total: int, done: int):
        live = sys.stdout.isatty()
        self._bar = tqdm(total=total, initial=done, bar_format="{bar:12}{desc}", file=sys.stdout) if live else None
        self._total = total
        self._printed = -math.inf

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, row: dict, eta: float) -> None:
        """Show the metrics row of a finished step; `eta` is the time left in seconds."""
        text = (
            f"step {row['step']:>{len(str(self._total))}}/{self._total}  loss {row['loss']:.3f}{_z(row, 'loss_z')}  "
            f"lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}{_z(row, 'norm_z')}  {row['tokens_per_s']:,.0f} tok/s  "
            f"MFU {percent(row['mfu'])}  ETA {clock(eta)}"
        )
        if self._bar is not None:
            self._bar.n = row["step"]
            self._bar.set_description_str(f" {text}")
        elif row["step"] == self._total or time.monotonic() - self._printed > self.PLAIN_SECONDS:
            self._printed = time.monotonic()
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Print an event above the live line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)


def clock(seconds: float) -> str:
    """Format a duration: 75 -> "1:15", 3725 -> "1:02:05", two days -> "2d 00:00"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _z(row: dict, name: str) -> str:
    """Format a z-score as llm.c does; "" until its window is full."""
    z = row.get(name, math.nan)
    return f" ({z:+.2f}z)" if math.isfinite(z) else ""


def percent(value: float | None) -> str:
    """Format a utilisation, 0 to 1, as a percentage; None is "unknown"."""
    return "unknown" if value is None else f"{100 * value:.1f}%"


def _ops_text(chosen: dict[str, str], times: dict[str, dict[str, float | str]] | None) -> str:
    """Return which implementation computes which op; with the times of --backend auto, a line an op."""
    if times:
        return "auto, forward + backward\n" + "\n".join(
            _op_text(op, name, times.get(op)) for op, name in chosen.items()
        )
    names = set(chosen.values())
    text = names.pop() if len(names) == 1 else ", ".join(f"{op}={name}" for op, name in chosen.items())
    return text if times is None else f"auto: {text}"


def _op_text(op: str, name: str, results: dict[str, float | str] | None) -> str:
    if results is None:
        return f"{op}={name}, given by --ops"
    others = {
        other: "refused" if isinstance(ms, str) else f"{ms:.2f}" for other, ms in results.items() if other != name
    }
    return f"{op}={name} {results[name]:.2f} ms ({', '.join(f'{other} {ms}' for other, ms in others.items())})"


def _aligned(rows: dict[str, str]) -> str:
    """Return lines of names and texts in two columns; more lines of a text are indented."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}".replace("\n", "\n" + " " * (width + 2)) for name, text in rows.items())
