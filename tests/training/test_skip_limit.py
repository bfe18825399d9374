"""Steps whose loss or gradient is not finite are skipped, and too many in a row end the run."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gpt2fast.errors import RunError
from gpt2fast.train import train
from gpt2fast.training import log, session
from gpt2fast.weights import checkpoint
from tests.tools import tiny
from tests.tools.injected_runs import SHORT, rows


# ---- numbers ----
def spoil(monkeypatch, steps, value=math.nan, loss=False):
    """In these optimizer steps, counted from 1, make a gradient `value`; with `loss` also make the loss NaN."""
    real, taken = log.Log.step, [0]
    update = session.TrainingStep.update

    def spoiled(self):
        taken[0] += 1
        if taken[0] in steps:
            self.model.wpe.weight.grad[0, 0] = value
        return update(self)

    def step(self, lr, total, norm):
        real(self, lr, total * math.nan if loss and self.s.step in steps else total, norm)

    monkeypatch.setattr(session.TrainingStep, "update", spoiled)
    monkeypatch.setattr(log.Log, "step", step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(folder, capsys, monkeypatch, value):
    """The step is skipped and counted, in the file, on the screen and on resume; the run continues."""
    c = tiny.config(folder, **{**SHORT, "val_every": 0})
    spoil(monkeypatch, {2, 4}, value)
    train(replace(c, stop_at=5))
    assert "step 2: skipped, loss 5." in (said := capsys.readouterr().out)
    assert "(2 so far)" in said
    assert [row["skipped"] for row in rows(c)] == [0, 1, 1, 2, 2]
    assert [row["grad_norm"] is None for row in rows(c)] == [False, True, False, True, False]
    train(replace(c, resume=True))
    assert [row["skipped"] for row in rows(c)][-1] == 2
    steps = load_file(checkpoint.list_checkpoints(c.folder / "checkpoints")[-1][1] / "optimizer.safetensors")
    assert {float(x) for name, x in steps.items() if name.startswith("step.")} == {4.0}


@pytest.mark.parametrize("loss", [False, True], ids=["gradient", "loss"])
def test_too_many_steps_left_out(folder, capsys, monkeypatch, loss):
    """The limit counts steps in a row. The last good checkpoint is named, and is kept although --keep is 1."""
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


def test_an_overflow_under_loss_scaling(folder, capsys, monkeypatch):
    """GradScaler finds its scale by overflows: they count towards the limit only where the scale is at most 1."""
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
