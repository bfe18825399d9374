"""When memory runs out, one line says what to lower."""

from dataclasses import replace

import pytest
import torch

from gpt2fast import train as program
from gpt2fast.errors import RunError
from gpt2fast.model import GPT
from gpt2fast.train import train
from gpt2fast.training import session
from gpt2fast.weights import checkpoint
from tests.tools import tiny
from tests.tools.injected_runs import SHORT, rows, rubbish, straight, weights


# ---- memory ----
def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "use --batch-size 1; a step stays the same"),
        ({"batch_size": 6, "total_batch": 96 * 2}, "use --batch-size 3;"),
        ({"batch_size": 1}, "use --recompute,"),
        ({"batch_size": 1, "recompute": True}, "use --seq-len 8"),
        ({"batch_size": 1, "recompute": True, "seq_len": 1}, "train a smaller model"),
    ],
    ids=str,
)
def test_out_of_memory_before_the_first_step(folder, monkeypatch, changes, remedy):
    """The line says what to lower, and to what; nothing is written."""
    monkeypatch.setattr(GPT, "forward", out_of_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 78 * 10**9)
    with pytest.raises(RunError, match=remedy) as stopped:
        train(tiny.config(folder, **changes))
    assert "(this run used up to 78.0 GB of the device's 80.0, and 2.0 are free)" in str(stopped.value)
    assert stopped.value.exit_code == 1
    assert not (folder / "out").exists()


def test_out_of_memory_while_training(folder, capsys, monkeypatch):
    """In a step, and while saving: the last checkpoint stays, no partial file does, and the run can be resumed."""
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
    monkeypatch.setattr(program, "draw_loss_curve", lambda s: None)
    train(replace(c, resume=True))
    assert (rows(c), weights(c)) == want
