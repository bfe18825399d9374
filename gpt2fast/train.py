"""Train GPT-2: `python -m gpt2fast.train [PRESET] [--flags]`.

`train(settings)` prepares everything (session.py), locks the run's folder (run.py), and takes steps until the run is
complete or interrupted. The loop never waits for the device: losses stay there until they are shown (log.py).
"""

import contextlib
import gc
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace

import torch

from gpt2fast import command
from gpt2fast.command import run_main
from gpt2fast.errors import RunError, UserError
from gpt2fast.files.atomic import write_atomic
from gpt2fast.files.locked import locked
from gpt2fast.inference import hellaswag
from gpt2fast.inference.loss import split_loss
from gpt2fast.inference.text import sample_text
from gpt2fast.machine import versions
from gpt2fast.machine.device import any_algorithm, autocast, keep_freed_memory, pick_device, use_allowed_cores
from gpt2fast.machine.joined import joined, one_complains
from gpt2fast.machine.world import ALONE, World
from gpt2fast.training import config, optim, plot, run
from gpt2fast.training.choices import runnable_settings
from gpt2fast.training.config import PRESETS, TrainConfig
from gpt2fast.training.log import Log
from gpt2fast.training.memory import out_of_memory
from gpt2fast.training.record import changed_settings, read_record
from gpt2fast.training.run import Interrupt
from gpt2fast.training.screen import Screen, header, summary
from gpt2fast.training.session import Session, start_session
from gpt2fast.training.skip_limit import SkipLimit
from gpt2fast.weights import checkpoint


@torch.no_grad()
def validate(s: Session, interrupt: Interrupt) -> float | None:
    """Return the mean loss of --val-batches micro-batches of the validation split, or of all of it; None if
    interrupted."""
    val = s.inputs.val
    assert val, "only called if there is a split"
    if not s.config.val_batches:
        found = split_loss(
            s.model, s.inputs.dataset.val, val.B, val.T, s.place.precision,
            give_up=lambda: bool(interrupt.signal), world=s.world,
        )  # fmt: skip
        return found.loss if found else None
    count = min(s.config.val_batches, val.batches_per_epoch)
    batches = val.batches(s.world.rank, s.place.device, s.world.size)
    losses = [torch.zeros((), device=s.place.device)]
    for _ in range(s.world.rank, count, s.world.size):
        if interrupt.signal:
            break
        with autocast(s.place.device, s.place.precision):
            losses.append(s.model(*next(batches)))  # not the compiled model, which would be compiled again
    total, given_up = s.world.totals(sum(torch.stack(losses).tolist()), bool(interrupt.signal))
    return None if given_up else total / count


def score_hellaswag(s: Session, interrupt: Interrupt) -> hellaswag.Score | None:
    """Return HellaSwag's accuracies; None if interrupted."""
    tokens = s.config.batch_size * s.config.seq_len
    return hellaswag.score(
        s.model,
        s.inputs.hellaswag,
        s.place.precision,
        tokens=tokens,
        give_up=lambda: bool(interrupt.signal),
        world=s.world,
    )


def sample_texts(s: Session) -> list[str]:
    """Return --samples texts, which depend only on weights, seed and step; each rank writes its share of them."""
    c = s.config
    with any_algorithm():
        texts = [
            sample_text(
                s.model, c.prompt, c.sample_tokens, precision=s.place.precision, seed=c.seed + s.step + i,
                vocab_file=c.tokenizer_file,
            )
            for i in range(s.world.rank, c.samples, s.world.size)
        ]  # fmt: skip
    return s.world.interleave(texts, c.samples)


def save_checkpoint(s: Session, log: Log) -> None:
    """Save a checkpoint, and delete the oldest beyond --keep.

    While steps are being skipped no checkpoint is deleted. A skipped step does not change the weights; but if the
    newest weights are what makes the loss infinite, only an older checkpoint is good.
    """
    state = {
        "position": s.step * s.config.accumulation,  # the loader's: the number of the next batch
        "seconds": s.seconds,
        "scaler": s.take_step.scaler.state_dict(),
        "data_fingerprint": s.inputs.dataset.fingerprint,
        "config": config.to_dict(s.config),
        "ops": asdict(s.choices.ops),
    }
    keep = s.config.keep + log.skip_limit.in_a_row
    checkpoint.save(s.checkpoints, s.step, s.model, s.take_step.optimizer, state, keep, s.world)


def draw_loss_curve(s: Session) -> None:
    """Draw loss.png, on rank 0."""
    if not s.world.main:
        return
    folder = s.config.folder
    title = f"{folder.name} on {s.inputs.dataset.name}"
    plot.loss_curve(run.iter_metrics(folder / "metrics.jsonl"), folder / "loss.png", title, s.inputs.entropy)
    gc.collect()  # a figure is a reference cycle with its pixels: without this, 50 MB in 1000 steps of tests.long.soak


def run_due_events(s: Session, log: Log, interrupt: Interrupt, done: Collection[str] = ()) -> None:
    """Validate, score HellaSwag, sample and save, whichever is due after this step and not yet in metrics.jsonl.

    `done`: the names that metrics.jsonl has for this step.
    """
    c = s.config

    def due(every: int) -> bool:
        return every > 0 and (s.step % every == 0 or s.step == c.steps)

    if not any(map(due, (c.val_every, c.hellaswag_every, c.sample_every, c.checkpoint_every))):
        return
    log.flush()  # too many skipped steps end the run here, before it is saved
    if due(c.val_every) and "val_loss" not in done and s.inputs.val and (loss := validate(s, interrupt)) is not None:
        log.val_loss = loss
        log.metrics.write({"step": s.step, "val_loss": loss})
        log.screen.say(f"step {s.step}: validation loss {loss:.4f}")
        draw_loss_curve(s)
    if (
        due(c.hellaswag_every)
        and "hellaswag" not in done
        and s.inputs.hellaswag
        and (found := score_hellaswag(s, interrupt))
    ):
        log.metrics.write({"step": s.step, "hellaswag": found.acc_norm, "hellaswag_acc": found.acc})
        log.screen.say(f"step {s.step}: HellaSwag acc_norm {found.acc_norm:.4f}, acc {found.acc:.4f}")
    if due(c.sample_every) and "sample" not in done and not s.world.largest(interrupt.signal or 0):
        for text in sample_texts(s):
            log.metrics.write({"step": s.step, "sample": text})
            log.screen.say(f"step {s.step}: sample\n" + "\n".join(f"  | {line}" for line in text.splitlines()))
    if due(c.checkpoint_every):
        save_checkpoint(s, log)
    log.start_clock()


def train_loop(s: Session, log: Log, interrupt: Interrupt) -> None:
    """Take steps until the last one, --stop-at, or a signal to any rank, and then save a checkpoint."""
    c = s.config
    batches = s.batches()
    end = min(c.steps, c.stop_at or c.steps)
    if s.step:  # a signal that ended the run may have cut off what was due after its last step
        there = json.dumps([name for row in log.metrics.before if row["step"] == s.step for name in row])
        run_due_events(s, log, interrupt, json.loads(s.world.broadcast(there)))
    while s.step < end and not s.world.largest(interrupt.signal or 0):
        lr = optim.learning_rate(s.step, peak=c.lr, floor=c.lr * c.lr_floor, warmup=c.warmup, total=c.steps)
        done = s.take_step(batches, lr, lambda: bool(s.world.largest(interrupt.overdue())))
        if done is None:
            break
        s.step += 1
        log.step(lr, *done)
        run_due_events(s, log, interrupt)
    log.flush()
    save_checkpoint(s, log)
    draw_loss_curve(s)


def write_record(s: Session) -> dict[str, list]:
    """Write config.json; a resume adds an entry to its list of resumes. Return what the resume changed."""
    path = s.config.folder / "config.json"
    row: dict = {
        "config": config.to_dict(s.config),
        "resolved": s.choices_and_facts,
        "machine": versions.record(),
        "resumes": [],
    }
    changed = {}
    if s.config.resume:
        old = json.loads(path.read_text())
        changed = changed_settings(row["config"], old["config"])
        was, now = old["resolved"]["ops"], row["resolved"]["ops"]
        if s.config.backend == "auto" and was != now:  # on another device, say: the run continues with other bits
            changed["auto"] = [was, now]
        if (ranks := old["resolved"]["ranks"]) != s.world.size:  # the same tokens, summed in another order
            changed["processes"] = [ranks, s.world.size]
        row["resumes"] = [*old["resumes"], {"step": s.step, "date": row["machine"]["date"], "changed": changed}]
    write_atomic(path, json.dumps(row, indent=1))
    return changed


def train(settings: TrainConfig, source: str = "settings as given", world: World = ALONE) -> int:
    """Train. Return the exit code: 0, or 128 + the signal that ended the run. UserError and RunError if it fails.

    Every rank of `world` must call it; only rank 0 writes and prints.
    """
    s = start_session(settings, world)
    c = s.config
    with locked(c.folder, "choose another name with --run NAME") if world.main else contextlib.nullcontext():
        if not c.resume and world.main:
            run.check_unused(c.folder)  # start_session did too, but only the lock keeps others from writing here
        print(header(s, source), flush=True)
        try:
            if world.main:
                run.remove_unfinished(c.folder)
                for name, (old, new) in write_record(s).items():
                    print(f"changed: {name} was {old} and is {new}", flush=True)
            tensorboard = c.folder / "tensorboard" if c.tensorboard else None
            with (
                Interrupt() as interrupt,
                Screen(c.steps, s.step) as screen,
                run.Metrics(c.folder / "metrics.jsonl", s.step, tensorboard)
                if world.main
                else run.NoMetrics() as metrics,
            ):
                log = Log(s, metrics, screen, SkipLimit(s))
                train_loop(s, log, interrupt)
        except torch.OutOfMemoryError:
            raise out_of_memory(c, begun=True) from None
        except OSError as error:
            where = error.filename or c.folder
            saved = checkpoint.list_checkpoints(s.checkpoints)
            then = "continue with --resume" if saved else f"delete {c.folder}, which has no checkpoint, and start again"
            raise RunError(f"cannot write {where} ({error.strerror}): free some space, then {then}") from None
    print(summary(s, log.loss, log.val_loss, log.speed))
    number = world.largest(interrupt.signal or 0)
    return 128 + number if number else 0


def read_settings(argv: Sequence[str], default_preset: str) -> tuple[TrainConfig, str]:
    """Read the settings from the command line, and with --resume from the run. Return them, and where they are from."""
    named = bool(argv) and not argv[0].startswith("-")
    preset, flags = (argv[0], argv[1:]) if named else (default_preset, argv)
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    c = command.parse(TrainConfig, flags, "gpt2fast.train [PRESET]", PRESETS[preset])
    source = f"preset {preset}" if named else f"preset {preset} (none was named; {', '.join(PRESETS)})"
    if c.resume:
        stored, _ = read_record(c.folder)
        if named and stored.model != c.model:
            raise UserError(
                f"run {c.folder} is not a {preset}: leave the preset out to continue with the run's own settings"
            )
        default = replace(stored, resume=True, stop_at=None, out=c.out, run=c.run)
        c = command.parse(TrainConfig, flags, "gpt2fast.train [PRESET]", default)
        config.check_resumable(c, stored)
        if not any(flag.startswith(("--backend", "--ops", "--optimizer", "--cuda-graph")) for flag in flags):
            c, why = runnable_settings(c, pick_device(c.device))
            if why:
                print(f"note: run {c.folder} was trained with {why}: torch is used instead", flush=True)
        source = f"settings of {c.folder}"
    return c, source


def main(argv: Sequence[str]) -> int:
    keep_freed_memory()
    use_allowed_cores()
    with joined() as world:
        with one_complains(world):
            settings, source = read_settings(argv, "gpt2" if torch.cuda.is_available() else "nano")
        return train(settings, source, world)


if __name__ == "__main__":
    run_main(main)
