"""The faults of docs/faults.md in data, numbers, clocks and other processes: each is injected."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest

from gpt2fast import auto
from gpt2fast import train as program
from gpt2fast.data import shards
from gpt2fast.errors import RunError, UserError
from gpt2fast.inference.loss import _batches
from gpt2fast.machine import versions
from gpt2fast.train import train
from gpt2fast.training import log, run
from gpt2fast.training.log import WINDOW
from gpt2fast.weights import checkpoint
from tests.tools import programs, tiny
from tests.tools.injected_runs import SHORT, rows, straight, weights


# ---- data ----
def test_a_shard_deleted_while_training(folder, capsys, monkeypatch):
    """Training continues, since the system keeps a mapped file. To resume, the file must be there again."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    real, shard = log.Log.step, folder / "data" / "train.bin"
    content = shard.read_bytes()

    def step(self, *args):
        shard.unlink(missing_ok=True)
        real(self, *args)

    monkeypatch.setattr(log.Log, "step", step)
    train(replace(c, stop_at=4))
    monkeypatch.undo()
    monkeypatch.setattr(program, "draw_loss_curve", lambda s: None)
    with pytest.raises(UserError, match="holds no training shard"):
        train(replace(c, resume=True))
    shard.write_bytes(content)
    train(replace(c, resume=True))
    assert (rows(c), weights(c)) == want


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [0, 1030], ids=["to nothing", "within the page"])
def test_a_shard_truncated_while_training(folder, capsys, monkeypatch, size, split):
    """Reading the map past the end of the file would kill Python without a message; one line names the shard."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    real, shard = log.Log.step, folder / "data" / f"{split}.bin"
    content = shard.read_bytes()

    def step(self, *args):
        real(self, *args)
        if self.s.step == 2:
            os.truncate(shard, size)

    monkeypatch.setattr(log.Log, "step", step)
    message = rf"shard .*{split}.bin has been cut to {size} bytes, of {len(content)}.* continue with --resume"
    with pytest.raises(RunError, match=message):
        train(c)
    monkeypatch.undo()
    monkeypatch.setattr(program, "draw_loss_curve", lambda s: None)
    shard.write_bytes(content)
    train(replace(c, resume=True))
    assert (rows(c), weights(c)) == want


def test_a_truncated_shard_is_noticed_in_a_whole_split_too(folder):
    shard = shards.open_shard(folder / "data" / "val.bin", 50257)
    os.truncate(folder / "data" / "val.bin", 1030)
    with pytest.raises(RunError, match="has been cut"):
        list(_batches([shard], 2, 16, 50257, range(100)))


def test_a_loss_spike(folder, capsys, monkeypatch):
    """It is printed, z is in every row, and both are the same after a resume, whose window is filled from the file."""
    assert WINDOW == 128
    n = 8
    monkeypatch.setattr("gpt2fast.training.log.WINDOW", n)
    c = tiny.config(folder, steps=n + 12, val_every=0, checkpoint_every=0, spike=1.5, lr=1e-3)
    want = straight(c)
    said = capsys.readouterr().out
    zs = [row["loss_z"] for row in want[0]]
    assert [z is None for z in zs] == [True] * (n - 1) + [False] * 13
    losses = [row["loss"] for row in want[0][-n:]]
    assert zs[-1] == pytest.approx((losses[-1] - np.mean(losses)) / np.std(losses), rel=1e-9)
    spikes = [row["step"] for row in want[0] if row["loss_z"] is not None and abs(row["loss_z"]) > 1.5]
    assert 0 < len(spikes) < 13
    assert all(f"step {step}: loss " in said and "is a spike" in said for step in spikes)
    train(replace(c, stop_at=n + 3))
    train(replace(c, resume=True, spike=0))
    assert "is a spike" not in capsys.readouterr().out.split("from step")[-1]
    assert (rows(c), weights(c)) == want


# ---- clocks and other processes ----
def test_a_clock_that_goes_backwards(folder, capsys, monkeypatch, planted, cache_home):
    """Dates are only recorded; durations are measured by a monotonic clock."""
    c = tiny.config(folder, backend="auto", **SHORT)
    want = straight(c)
    now = [2e9]

    def an_hour_earlier():
        now[0] -= 3600
        return now[0]

    class Date(versions.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(an_hour_earlier(), tz)

    monkeypatch.setattr(time, "time", an_hour_earlier)
    monkeypatch.setattr(versions.datetime, "datetime", Date)
    measured = len(planted["measured"])
    train(replace(c, stop_at=3))
    train(replace(c, resume=True))
    assert len(planted["measured"]) == measured  # from the cache
    assert auto.cache_file().exists()
    assert (rows(c), weights(c)) == want
    assert all(row["tokens_per_s"] > 0 for row in run.read_metrics(c.folder / "metrics.jsonl") if "loss" in row)
    states = [checkpoint.read_state(path) for _, path in checkpoint.list_checkpoints(c.folder / "checkpoints")]
    assert states[0]["seconds"] < states[-1]["seconds"]


def refused(c) -> int:
    """Train, in another process: print the error and return its exit code."""
    try:
        train(c)
    except UserError as error:
        print(error)
        return error.exit_code
    return 0


def test_two_processes_in_one_run_folder(folder, capsys, monkeypatch):
    """The second, a real process, is refused in one line, with and without --resume; the first is not disturbed."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    real, answers = program.save_checkpoint, []

    def save(*args):
        real(*args)
        if not answers:
            for i, config in enumerate((c, replace(c, resume=True))):
                log = folder / f"second{i}.txt"
                assert programs.call(refused, config, cwd=folder, log=log).wait() == 2
                answers.append(log.read_text())

    monkeypatch.setattr(program, "save_checkpoint", save)
    train(c)
    assert "already holds a run" in answers[0]
    assert "in use by another process" in answers[1]
    assert (rows(c), weights(c)) == want
