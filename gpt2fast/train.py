"""Train GPT-2: `python -m gpt2fast.train [PRESET] [--flags]`.

`train(config)` gets everything ready (session.py), takes the run's folder (run.py) and steps until it is done or
interrupted. The loop never waits for the device: losses stay there until they are shown.
"""

import gc
import json
import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from statistics import fmean, median

import torch
from torch import Tensor

from gpt2fast import checkpoint, config, hellaswag, machine, optim, plot, run
from gpt2fast.allocator import keep_freed_memory
from gpt2fast.config import TrainConfig
from gpt2fast.device import any_algorithm, autocast, use_allowed_cores
from gpt2fast.errors import RunError, run_main
from gpt2fast.evaluate import split_loss
from gpt2fast.files import write_atomic
from gpt2fast.run import Interrupt
from gpt2fast.sample import sample_text
from gpt2fast.screen import Screen, header, summary
from gpt2fast.session import Session, out_of_memory, prepare

LOG_SECONDS = 1.0  # on CUDA, unless --log-every says how many steps
SUMMARY_STEPS = 20  # the summary's training loss is the mean of so many steps


class Log:
    """Keeps losses and norms on the device, reads them back together, writes and shows them."""

    def __init__(self, s: Session, metrics: run.Metrics, screen: Screen):
        self.s, self.metrics, self.screen = s, metrics, screen
        self.val_loss: float | None = None
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._losses: deque[float] = deque(maxlen=SUMMARY_STEPS)
        self._step_seconds: deque[float] = deque(maxlen=50)
        self.start_clock()

    def start_clock(self) -> None:
        """What has passed since the last flush belongs to no step."""
        self._start = time.perf_counter()

    def step(self, lr: float, loss: Tensor, norm: Tensor) -> None:
        self._pending.append((self.s.step, lr, loss, norm))
        if self._is_time():
            self.flush()

    def _is_time(self) -> bool:
        every = self.s.config.log_every
        if every is None and self.s.device.type == "cuda":
            return time.perf_counter() - self._start >= LOG_SECONDS
        return len(self._pending) >= (every or 1)

    def flush(self) -> None:
        """The one place where the host waits for the device. RunError on a loss or norm that is not finite."""
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
            # fp16 gradients may overflow: the scaler then skips the update and lowers the loss scale
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.s.precision == "fp16"):
                raise RunError(self._not_finite(step, loss, norm))
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": step * c.total_batch}
            row |= {"tokens_per_s": round(speed, 1), "mfu": self.s.mfu(speed)}
            self.metrics.write(row)
            self._losses.append(loss)
        self.screen.step(row, eta=(c.steps - self.s.step) * median(self._step_seconds))
        self.start_clock()

    @property
    def loss(self) -> float | None:
        return fmean(self._losses) if self._losses else None

    @property
    def speed(self) -> float:
        """Median tokens/s."""
        return self.s.config.total_batch / median(self._step_seconds) if self._step_seconds else math.nan

    def _not_finite(self, step: int, loss: float, norm: float) -> str:
        kept = checkpoint.list_checkpoints(self.s.checkpoints)
        good = f"the last good checkpoint is {kept[-1][1]}" if kept else "there is no checkpoint yet"
        return (
            f"step {step}: loss {loss}, gradient norm {norm}: the run stops and keeps nothing of it; {good}; "
            "try a lower --lr, a longer --warmup or --precision fp32"
        )


@torch.no_grad()
def validate(s: Session, interrupt: Interrupt) -> float | None:
    """Mean loss over `val_batches` micro-batches of the validation split, or all of it; None when interrupted."""
    if not s.config.val_batches:
        found = split_loss(
            s.model, s.dataset.val, s.val.B, s.val.T, s.precision, give_up=lambda: bool(interrupt.signal)
        )
        return found and found.loss
    batches = s.val.batches(0, s.device)
    losses = []
    for _ in range(min(s.config.val_batches, s.val.batches_per_epoch)):
        if interrupt.signal:
            return None
        with autocast(s.device, s.precision):
            losses.append(s.model(*next(batches)))  # not the compiled one: it would be compiled again
    return torch.stack(losses).mean().item()


def judge(s: Session, interrupt: Interrupt) -> hellaswag.Score | None:
    """HellaSwag's accuracies; None when interrupted."""
    tokens = s.config.batch_size * s.config.seq_len
    return hellaswag.score(s.model, s.hellaswag, s.precision, tokens=tokens, give_up=lambda: bool(interrupt.signal))


def sample(s: Session) -> str:
    """A text that depends on the weights and (seed, step) alone."""
    c = s.config
    with any_algorithm():
        return sample_text(
            s.model, c.prompt, c.sample_tokens, precision=s.precision, seed=c.seed + s.step, vocab_file=c.tokenizer_file
        )


def save(s: Session) -> None:
    state = {
        "position": s.step * s.config.accumulation,  # of the loader: the next batch's number
        "seconds": s.seconds,
        "scaler": s.take_step.scaler.state_dict(),
        "data_fingerprint": s.dataset.fingerprint,
        "config": config.to_dict(s.config),
    }
    checkpoint.save(s.checkpoints, s.step, s.model, s.take_step.optimizer, state, s.config.keep)


def draw(s: Session) -> None:
    folder = s.config.folder
    title = f"{folder.name} on {s.dataset.name}"
    rows = run.read_metrics(folder / "metrics.jsonl", ("step", "loss", "val_loss"))
    plot.loss_curve(rows, folder / "loss.png", title, s.entropy)
    gc.collect()  # a figure is a cycle of references around its pixels: 50 MB in 1000 steps of benchmarks.soak


def events(s: Session, log: Log, interrupt: Interrupt, done: Collection[str] = ()) -> None:
    """Validation, sample and checkpoint, where they are due after step `s.step` and metrics.jsonl has them not: `done`
    is what it has."""
    c = s.config

    def due(every: int) -> bool:
        return every > 0 and (s.step % every == 0 or s.step == c.steps)

    if not any(map(due, (c.val_every, c.hellaswag_every, c.sample_every, c.checkpoint_every))):
        return
    log.flush()  # a loss that is not finite ends the run here, before it is saved
    if due(c.val_every) and "val_loss" not in done and s.val and (loss := validate(s, interrupt)) is not None:
        log.val_loss = loss
        log.metrics.write({"step": s.step, "val_loss": loss})
        log.screen.say(f"step {s.step}: validation loss {loss:.4f}")
        draw(s)
    if due(c.hellaswag_every) and "hellaswag" not in done and s.hellaswag and (found := judge(s, interrupt)):
        log.metrics.write({"step": s.step, "hellaswag": found.acc_norm, "hellaswag_acc": found.acc})
        log.screen.say(f"step {s.step}: HellaSwag acc_norm {found.acc_norm:.4f}, acc {found.acc:.4f}")
    if due(c.sample_every) and "sample" not in done and not interrupt.signal:
        text = sample(s)
        log.metrics.write({"step": s.step, "sample": text})
        log.screen.say(f"step {s.step}: sample\n" + "\n".join(f"  | {line}" for line in text.splitlines()))
    if due(c.checkpoint_every):
        save(s)
    log.start_clock()


def loop(s: Session, log: Log, interrupt: Interrupt) -> None:
    """Steps until the last, `stop_at` or a signal. Then there is a checkpoint of the last finished step."""
    c = s.config
    batches = s.train.batches(s.step * c.accumulation, s.device)
    end = min(c.steps, c.stop_at or c.steps)
    if s.step:  # the signal that ended the run before this one also ended the events of its last step
        rows = run.read_metrics(c.folder / "metrics.jsonl")
        events(s, log, interrupt, {name for row in rows if row["step"] == s.step for name in row})
    while s.step < end and not interrupt.signal:
        lr = optim.learning_rate(s.step, peak=c.lr, floor=c.lr * c.lr_floor, warmup=c.warmup, total=c.steps)
        done = s.take_step(batches, lr, interrupt.overdue)
        if done is None:
            break
        s.step += 1
        log.step(lr, *done)
        events(s, log, interrupt)
    log.flush()
    save(s)
    draw(s)


def record(s: Session) -> dict[str, list]:
    """Write config.json, with one more entry in its list of resumes if this is one; what that one changed."""
    path = s.config.folder / "config.json"
    row = {"config": config.to_dict(s.config), "resolved": s.resolved, "machine": machine.record(), "resumes": []}
    changed = {}
    if s.config.resume:
        old = json.loads(path.read_text())
        changed = config.changes(row["config"], old["config"])
        was, now = old["resolved"]["ops"], row["resolved"]["ops"]
        if s.config.backend == "auto" and was != now:  # on another device, say: the run goes on, not bit for bit
            changed["auto"] = [was, now]
        row["resumes"] = [*old["resumes"], {"step": s.step, "date": row["machine"]["date"], "changed": changed}]
    write_atomic(path, json.dumps(row, indent=1))
    return changed


def train(c: TrainConfig, source: str = "settings as given") -> int:
    """Train. The exit code is 0, or 128 + the signal that ended it; UserError and RunError say what went wrong."""
    s = prepare(c)
    c = s.config
    with run.locked(c.folder):
        if not c.resume:
            run.check_free(c.folder)  # prepare did, but only now can nobody else write here
        print(header(s, source), flush=True)
        try:
            run.sweep(c.folder)
            for name, (old, new) in record(s).items():
                print(f"changed: {name} was {old} and is {new}", flush=True)
            tensorboard = c.folder / "tensorboard" if c.tensorboard else None
            with (
                Interrupt() as interrupt,
                Screen(c.steps, s.step) as screen,
                run.Metrics(c.folder / "metrics.jsonl", s.step, tensorboard) as metrics,
            ):
                log = Log(s, metrics, screen)
                loop(s, log, interrupt)
        except torch.OutOfMemoryError:
            raise out_of_memory(c) from None
        except OSError as error:
            where = error.filename or c.folder
            raise RunError(
                f"cannot write {where} ({error.strerror}): free some space, then continue with --resume"
            ) from None
    print(summary(s, log.loss, log.val_loss, log.speed))
    return 128 + interrupt.signal if interrupt.signal else 0


def main(argv: Sequence[str]) -> int:
    keep_freed_memory()
    use_allowed_cores()
    settings, source = config.parse(argv, "gpt2" if torch.cuda.is_available() else "nano")
    return train(settings, source)


if __name__ == "__main__":
    run_main(main)
