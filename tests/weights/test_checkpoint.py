"""Checkpoints are complete or refused, hold no pickle, and only the newest are kept."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2fast.errors import UserError
from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from gpt2fast.train import train
from gpt2fast.weights import checkpoint
from tests.tools import tiny

pytest.importorskip("tyro", reason="needs tyro for the command line")


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # in manifest.json, a digit of a checksum
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "how", [flip, lambda path: path.write_bytes(path.read_bytes()[:40]), Path.unlink], ids=["bit", "cut", "gone"]
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_still_good(folder, capsys, name, how):
    c = tiny.config(folder, stop_at=12)
    train(c)
    (_, good), (_, newest) = checkpoint.list_checkpoints(c.folder / "checkpoints")
    how(newest / name)
    with pytest.raises(UserError, match="is damaged .* delete that folder to resume from the one before"):
        train(replace(c, resume=True, stop_at=None))
    checkpoint.remove_folder(newest)
    assert good.name == "step_00000010"
    assert train(replace(c, resume=True, stop_at=None)) == 0


def test_a_checkpoint_of_another_shape_is_refused(folder, capsys):
    c = tiny.config(folder, steps=4, warmup=1)
    train(c)
    _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
    wider = GPT(replace(tiny.MODEL, n_embd=32), build(OpsConfig()))
    with pytest.raises(UserError, match=r"does not fit the model: .*size mismatch for wte.weight"):
        checkpoint.load_weights(path, wider)


def test_files_have_the_users_usual_mode(folder, capsys):
    c = tiny.config(folder, steps=2, warmup=1)
    train(c)
    umask = os.umask(0)
    os.umask(umask)
    _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


def test_checkpoints_have_50257_rows_and_no_pickle(folder, capsys):
    from safetensors import safe_open

    c = tiny.config(folder, steps=2, warmup=1, model=tiny.GPT2_WORDS)
    train(c)
    _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(path / name, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert {shape[0] for key, shape in shapes.items() if key.endswith("wte.weight") and shape} == {50257}
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_only_the_newest_are_kept(folder, capsys):
    c = tiny.config(folder, checkpoint_every=3, keep=2)
    train(c)
    assert [step for step, _ in checkpoint.list_checkpoints(c.folder / "checkpoints")] == [18, 20]
    assert not list((c.folder / "checkpoints").glob(".*"))
