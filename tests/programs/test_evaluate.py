"""The results of evaluate, its command line, and what it refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2fast import evaluate
from gpt2fast.data import dataset
from gpt2fast.errors import RunError, UserError
from gpt2fast.evaluate import EvaluateConfig
from gpt2fast.files import atomic
from gpt2fast.inference import loss
from gpt2fast.train import train
from gpt2fast.weights import load
from tests.tools import tiny
from tests.tools.hellaswag import write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the settings of a finished run."""
    folder = tmp_path_factory.mktemp("evaluate")
    c = tiny.config(folder, steps=3, warmup=1, model=tiny.GPT2_WORDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(c)
    return c


def settings(run, **changes):
    return EvaluateConfig(**{"source": str(run.folder), "device": "cpu", "precision": "fp32"} | changes)


def test_a_run_is_evaluated_on_its_own_data(run):
    result = evaluate.evaluate(settings(run))
    val = dataset.open_folder(run.folder.parents[1] / "data", 50257).val
    assert result["tokens"] == len(val[0]) - 1
    assert result["whole_split"]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["unigram_entropy"] == pytest.approx(dataset.unigram_entropy(np.bincount(val[0])))
    assert result["trained_on"] == result["fingerprint"]
    assert result["seq_len"] == run.seq_len
    assert result["ops"]["attention"] == "gpt2fast.cpu"
    assert "hellaswag" not in result
    checkpoint = run.folder / "checkpoints" / "step_00000003"
    assert evaluate.evaluate(settings(run, source=str(checkpoint)))["loss"] == result["loss"]
    train_split = evaluate.evaluate(settings(run, split="train", max_batches=2, batch_size=3))
    assert (train_split["tokens"], train_split["whole_split"]) == (2 * 3 * 16, False)


def test_a_note_says_that_the_run_was_trained_on_other_data(run, tmp_path):
    result = evaluate.evaluate(settings(run, data=str(tiny.write_data(tmp_path / "other", seed=1))))
    assert "trained on other data" in evaluate.results_table(result)
    assert "trained on other data" not in evaluate.results_table(evaluate.evaluate(settings(run)))


def test_hellaswag_of_a_run(run, tmp_path):
    file = write_jsonl(tmp_path / "val.jsonl")
    result = evaluate.evaluate(settings(run, data="none", from_=file, max_examples=5))
    assert result["hellaswag"]["examples"] == 5
    assert result["hellaswag"]["cut"] > 0
    assert "loss" not in result
    assert f"5 examples, {result['hellaswag']['cut']} with a shortened context" in evaluate.results_table(result)


def test_command_line(run, tmp_path, run_module):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    out = tmp_path / "new" / "result.json"
    file = write_jsonl(tmp_path / "val.jsonl")
    flags = ["--device", "cpu", "--from", file, "--out", out]
    done = run_module("gpt2fast.evaluate", run.folder, *flags, check=True)
    result = json.loads(out.read_text())
    assert f"{result['loss']:.4f} nats per token" in done.stdout
    assert f"acc_norm {result['hellaswag']['acc_norm']:.4f} +-" in done.stdout
    assert result["versions"]["torch"] == torch.__version__
    assert "acc_norm" in done.stderr  # progress
    again = run_module("gpt2fast.evaluate", run.folder, *flags)
    assert (again.returncode, again.stderr.strip()) == (
        2, f"error: {out} already exists: choose another with --out",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere/x/y"}, "nowhere/x/y"),
        ({"data": "none"}, "nothing to evaluate: name"),
        ({"source": "nowhere", "data": None}, "nowhere does not exist"),
        ({"data": "nowhere"}, "data nowhere does not exist"),
        ({"seq_len": 17}, "--seq-len 17 is longer than the model's block size 16"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_examples": -1}, "--max-examples is -1"),
        ({"backend": "triton", "precision": "bf16"}, "interpreter|needs a CUDA GPU|n_embd|heads"),
    ],
)
def test_a_model_that_cannot_be_evaluated_is_refused(run, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(settings(run, **{"data": str(run.folder.parents[1] / "data")} | changes))


def test_a_missing_split_is_refused(run, tmp_path):
    tiny.write_data(tmp_path / "data")
    (tmp_path / "data" / "val.bin").unlink()
    with pytest.raises(UserError, match="has no val split"):
        evaluate.evaluate(settings(run, data=str(tmp_path / "data")))


def test_an_output_that_cannot_be_written_is_refused_first(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder to write to"):
        evaluate.evaluate(settings(run, out=tmp_path / "file" / "result.json"))
    atomic.check_new(tmp_path / "a" / "b.json")
    assert not (tmp_path / "a").exists()  # no folder is made before there are results


def test_a_loss_that_is_not_finite_is_an_error(run, monkeypatch):
    monkeypatch.setattr(evaluate, "split_loss", lambda *_, **__: replace(found, loss=math.nan))
    found = loss.SplitLoss(1.0, 1, True)
    with pytest.raises(RunError, match="the loss is nan"):
        evaluate.evaluate(settings(run))


def test_a_checkpoint_of_another_version_is_refused_and_one_without_a_fingerprint_is_not(run, tmp_path, monkeypatch):
    weights = load.read_weights(run.folder)
    monkeypatch.setattr(evaluate, "read_weights", lambda source: weights)
    del weights.state["data_fingerprint"]
    assert evaluate.evaluate(settings(run))["trained_on"] is None
    weights.state["config"]["of_tomorrow"] = 1
    with pytest.raises(UserError, match="state.json is damaged or of another version .*of_tomorrow.*name another"):
        evaluate.evaluate(settings(run))
