"""Train GPT-2: `python -m gpt2fast.train [PRESET] [--flags]`.

`train(config)` gets everything ready (session.py), takes the run's folder (run.py) and steps until it is done or
interrupted. The loop never waits for the device: losses stay there until they are shown.
"""

import contextlib
import gc
import json
import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from statistics import fmean, median

import torch
from torch import Tensor

from gpt2fast import checkpoint, config, distributed, hellaswag, machine, optim, plot, run
from gpt2fast.allocator import keep_freed_memory
from gpt2fast.config import TrainConfig
from gpt2fast.device import any_algorithm, autocast, use_allowed_cores
from gpt2fast.distributed import ALONE, World
from gpt2fast.errors import RunError, run_main
from gpt2fast.evaluate import split_loss
from gpt2fast.files import write_atomic
from gpt2fast.run import Interrupt
from gpt2fast.sample import sample_text
from gpt2fast.screen import Screen, header, summary
from gpt2fast.session import Session, out_of_memory, prepare
from gpt2fast.spikes import WINDOW, Spikes

LOG_SECONDS = 1.0  # on CUDA, unless --log-every says how many steps
SCALE_FLOOR = 1.0  # of fp16's loss: a gradient that overflows there overflows by itself
SUMMARY_STEPS = 20  # the summary's training loss is the mean of so many steps


class Log:
    """Keeps losses and norms on the device, reads them back together, writes and shows them."""

    def __init__(self, s: Session, metrics: run.Metrics | run.NoMetrics, screen: Screen):
        self.s, self.metrics, self.screen = s, metrics, screen
        self.val_loss: float | None = None
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._losses: deque[float] = deque(maxlen=SUMMARY_STEPS)
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._loss_spikes, self._norm_spikes = Spikes(), Spikes()
        self.skipped = self.in_a_row = 0  # steps that were left out: of the whole run, and the newest ones
        for row in metrics.before:
            if "loss" in row:
                self._judge(row)
                self.skipped = row.get("skipped", 0)
        self.start_clock()

    def _judge(self, row: dict) -> dict[str, float]:
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
        if every is None and self.s.device.type == "cuda":
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
            skipped = not (math.isfinite(loss) and math.isfinite(norm))
            self.skipped += skipped
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": step * c.total_batch}
            row |= {"tokens_per_s": round(speed, 1), "mfu": self.s.mfu(speed), "skipped": self.skipped}
            row |= self._judge(row)
            self.metrics.write(row)
            if math.isfinite(loss):
                self._losses.append(loss)
            self._say(row, skipped)
        self.screen.step(row, eta=(c.steps - self.s.step) * median(self._step_seconds))
        self.start_clock()

    @property
    def loss(self) -> float | None:
        return fmean(self._losses) if self._losses else None

    @property
    def speed(self) -> float:
        """Median tokens/s."""
        return self.s.config.total_batch / median(self._step_seconds) if self._step_seconds else math.nan

    def _say(self, row: dict, skipped: bool) -> None:
        """What is unusual about a step. RunError if it is one too many that was left out."""
        step, limit, what = row["step"], self.s.config.skip_limit, f"loss {row['loss']}, norm {row['grad_norm']}"
        if not skipped:
            self.in_a_row = 0
            if 0 < self.s.config.spike < abs(row["loss_z"]):
                z = f"{row['loss_z']:+.2f} standard deviations from the mean of the last {WINDOW}"
                self.screen.say(f"step {step}: loss {row['loss']:.3f} is a spike, {z}")
            return
        self.screen.say(f"step {step}: left out, {what} ({self.skipped} so far)")
        if math.isfinite(row["loss"]) and self.s.take_step.scaler.get_scale() > SCALE_FLOOR:
            return  # how fp16 finds its loss scale
        self.in_a_row += 1
        if self.in_a_row >= limit:
            first = step - limit + 1
            kept = [path for saved, path in checkpoint.list_checkpoints(self.s.checkpoints) if saved < first]
            good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint from before"
            raise RunError(
                f"step {step}: {what}: --skip-limit {limit} steps in a row were left out; {good}; "
                "try a lower --lr, a longer --warmup or --precision fp32"
            )


@torch.no_grad()
def validate(s: Session, interrupt: Interrupt) -> float | None:
    """Mean loss over `val_batches` micro-batches of the validation split, or all of it; None when interrupted."""
    if not s.config.val_batches:
        found = split_loss(
            s.model, s.dataset.val, s.val.B, s.val.T, s.precision,
            give_up=lambda: bool(interrupt.signal), world=s.world,
        )  # fmt: skip
        return found.loss if found else None
    count = min(s.config.val_batches, s.val.batches_per_epoch)
    batches = s.val.batches(s.world.rank, s.device, s.world.size)
    losses = [torch.zeros((), device=s.device)]
    for _ in range(s.world.rank, count, s.world.size):
        if interrupt.signal:
            break
        with autocast(s.device, s.precision):
            losses.append(s.model(*next(batches)))  # not the compiled one: it would be compiled again
    total, given_up = s.world.totals(sum(torch.stack(losses).tolist()), bool(interrupt.signal))
    return None if given_up else total / count


def judge(s: Session, interrupt: Interrupt) -> hellaswag.Score | None:
    """HellaSwag's accuracies; None when interrupted."""
    tokens = s.config.batch_size * s.config.seq_len
    return hellaswag.score(
        s.model, s.hellaswag, s.precision, tokens=tokens, give_up=lambda: bool(interrupt.signal), world=s.world
    )


def sample(s: Session) -> list[str]:
    """Texts that depend on the weights and (seed, step) alone; each rank writes its share of them."""
    c = s.config
    with any_algorithm():
        texts = [
            sample_text(
                s.model, c.prompt, c.sample_tokens, precision=s.precision, seed=c.seed + s.step + i,
                vocab_file=c.tokenizer_file,
            )
            for i in range(s.world.rank, c.samples, s.world.size)
        ]  # fmt: skip
    return s.world.deal(texts, c.samples)


def save(s: Session, log: Log) -> None:
    """As long as steps are being left out, no older checkpoint goes: weights never saw a NaN, but from the newest ones
    no batch could be computed, and if they are beyond that, what is good is older."""
    state = {
        "position": s.step * s.config.accumulation,  # of the loader: the next batch's number
        "seconds": s.seconds,
        "scaler": s.take_step.scaler.state_dict(),
        "data_fingerprint": s.dataset.fingerprint,
        "config": config.to_dict(s.config),
    }
    keep = s.config.keep + log.in_a_row
    checkpoint.save(s.checkpoints, s.step, s.model, s.take_step.optimizer, state, keep, s.world)


def draw(s: Session) -> None:
    if not s.world.main:
        return
    folder = s.config.folder
    title = f"{folder.name} on {s.dataset.name}"
    plot.loss_curve(run.iter_metrics(folder / "metrics.jsonl"), folder / "loss.png", title, s.entropy)
    gc.collect()  # a figure is a cycle of references around its pixels: 50 MB in 1000 steps of tests.long.soak


def events(s: Session, log: Log, interrupt: Interrupt, done: Collection[str] = ()) -> None:
    """Validation, sample and checkpoint, where they are due after step `s.step` and metrics.jsonl has them not: `done`
    is what it has."""
    c = s.config

    def due(every: int) -> bool:
        return every > 0 and (s.step % every == 0 or s.step == c.steps)

    if not any(map(due, (c.val_every, c.hellaswag_every, c.sample_every, c.checkpoint_every))):
        return
    log.flush()  # too many steps that were left out end the run here, before it is saved
    if due(c.val_every) and "val_loss" not in done and s.val and (loss := validate(s, interrupt)) is not None:
        log.val_loss = loss
        log.metrics.write({"step": s.step, "val_loss": loss})
        log.screen.say(f"step {s.step}: validation loss {loss:.4f}")
        draw(s)
    if due(c.hellaswag_every) and "hellaswag" not in done and s.hellaswag and (found := judge(s, interrupt)):
        log.metrics.write({"step": s.step, "hellaswag": found.acc_norm, "hellaswag_acc": found.acc})
        log.screen.say(f"step {s.step}: HellaSwag acc_norm {found.acc_norm:.4f}, acc {found.acc:.4f}")
    if due(c.sample_every) and "sample" not in done and not s.world.any(interrupt.signal or 0):
        for text in sample(s):
            log.metrics.write({"step": s.step, "sample": text})
            log.screen.say(f"step {s.step}: sample\n" + "\n".join(f"  | {line}" for line in text.splitlines()))
    if due(c.checkpoint_every):
        save(s, log)
    log.start_clock()


def loop(s: Session, log: Log, interrupt: Interrupt) -> None:
    """Steps until the last, `stop_at` or a signal to any rank. Then there is a checkpoint of the last finished step."""
    c = s.config
    batches = s.batches()
    end = min(c.steps, c.stop_at or c.steps)
    if s.step:  # the signal that ended the run before this one also ended the events of its last step
        there = json.dumps([name for row in log.metrics.before if row["step"] == s.step for name in row])
        events(s, log, interrupt, json.loads(s.world.share(there)))
    while s.step < end and not s.world.any(interrupt.signal or 0):
        lr = optim.learning_rate(s.step, peak=c.lr, floor=c.lr * c.lr_floor, warmup=c.warmup, total=c.steps)
        done = s.take_step(batches, lr, lambda: bool(s.world.any(interrupt.overdue())))
        if done is None:
            break
        s.step += 1
        log.step(lr, *done)
        events(s, log, interrupt)
    log.flush()
    save(s, log)
    draw(s)


def record(s: Session) -> dict[str, list]:
    """Write config.json, with one more entry in its list of resumes if this is one; what that one changed."""
    path = s.config.folder / "config.json"
    row: dict = {"config": config.to_dict(s.config), "resolved": s.resolved, "machine": machine.record(), "resumes": []}
    changed = {}
    if s.config.resume:
        old = json.loads(path.read_text())
        changed = config.changes(row["config"], old["config"])
        was, now = old["resolved"]["ops"], row["resolved"]["ops"]
        if s.config.backend == "auto" and was != now:  # on another device, say: the run goes on, not bit for bit
            changed["auto"] = [was, now]
        if (ranks := old["resolved"].get("ranks", 1)) != s.world.size:  # the same tokens, added up in another order
            changed["processes"] = [ranks, s.world.size]
        row["resumes"] = [*old["resumes"], {"step": s.step, "date": row["machine"]["date"], "changed": changed}]
    write_atomic(path, json.dumps(row, indent=1))
    return changed


def train(c: TrainConfig, source: str = "settings as given", world: World = ALONE) -> int:
    """Train. The exit code is 0, or 128 + the signal that ended it; UserError and RunError say what went wrong.

    Every rank of `world` calls it; rank 0 alone writes and prints.
    """
    s = prepare(c, world)
    c = s.config
    with run.locked(c.folder) if world.main else contextlib.nullcontext():
        if not c.resume and world.main:
            run.check_free(c.folder)  # prepare did, but only now can nobody else write here
        print(header(s, source), flush=True)
        try:
            if world.main:
                run.sweep(c.folder)
                for name, (old, new) in record(s).items():
                    print(f"changed: {name} was {old} and is {new}", flush=True)
            tensorboard = c.folder / "tensorboard" if c.tensorboard else None
            with (
                Interrupt() as interrupt,
                Screen(c.steps, s.step) as screen,
                run.Metrics(c.folder / "metrics.jsonl", s.step, tensorboard)
                if world.main
                else run.NoMetrics() as metrics,
            ):
                log = Log(s, metrics, screen)
                loop(s, log, interrupt)
        except torch.OutOfMemoryError:
            raise out_of_memory(c, begun=True) from None
        except OSError as error:
            where = error.filename or c.folder
            saved = checkpoint.list_checkpoints(s.checkpoints)
            then = "continue with --resume" if saved else f"delete {c.folder}, where no checkpoint is, and begin again"
            raise RunError(f"cannot write {where} ({error.strerror}): free some space, then {then}") from None
    print(summary(s, log.loss, log.val_loss, log.speed))
    number = world.any(interrupt.signal or 0)
    return 128 + number if number else 0


def main(argv: Sequence[str]) -> int:
    keep_freed_memory()
    use_allowed_cores()
    with distributed.joined() as world:
        with distributed.one_complains(world):
            settings, source = config.parse(argv, "gpt2" if torch.cuda.is_available() else "nano")
        return train(settings, source, world)


if __name__ == "__main__":
    run_main(main)
