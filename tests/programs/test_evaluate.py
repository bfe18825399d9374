"""Loss over a whole split is the exact mean over its tokens; what the command reports, and what it refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2fast import data, evaluate
from gpt2fast.errors import RunError, UserError
from gpt2fast.evaluate import EvaluateConfig, split_loss
from gpt2fast.model import GPTConfig
from gpt2fast.train import train
from tests.tools import tiny
from tests.tools.accuracy import assert_as_accurate
from tests.tools.hellaswag import build, write_jsonl

T = 8
CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=211)
LENGTHS = [3 * T + 1, 30, 1, 0, 2, T, T + 1, 5]  # whole windows; tails; nothing to predict; one token to predict


def shards(lengths=LENGTHS):
    random = np.random.default_rng(0)
    return [random.integers(0, CONFIG.vocab_size, n).astype(np.uint16) for n in lengths]


@torch.no_grad()
def brute_force(model, shards):
    """The mean over all tokens of their losses, window by window, no padding."""
    losses = []
    for tokens in shards:
        tokens = torch.from_numpy(tokens.astype(np.int64))
        for start in range(0, len(tokens) - 1, T):
            window = tokens[start : start + T + 1]
            losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("B", [1, 3, 50])
def test_whole_split_is_the_mean_over_its_tokens(B):
    model = build(config=CONFIG)
    found = split_loss(model, shards(), B, T, "fp32")
    assert (found.tokens, found.whole) == (sum(n - 1 for n in LENGTHS if n), True)
    truth = brute_force(build(config=CONFIG).double(), shards())
    assert_as_accurate(torch.tensor(found.loss), truth, brute_force(model, shards()))


@pytest.mark.kernel
def test_triton_gives_the_same(device):
    got, expected = (
        split_loss(build(backend, CONFIG).to(device), shards(LENGTHS[:3]), 2, T, "fp32").loss
        for backend in ("triton", "torch")
    )
    assert got == pytest.approx(expected, rel=1e-5)


def test_each_token_but_a_shards_first_is_predicted_once_from_those_before_it():
    got, context = [], []
    for x, y in evaluate._batches(shards(), 3, T, CONFIG.vocab_size, range(100)):
        assert x.shape == y.shape
        assert x.shape[1] == T
        got += y[y != -100].tolist()
        context += x[y != -100].tolist()
    assert got == [token for tokens in shards() for token in tokens[1:]]
    assert context == [token for tokens in shards() for token in tokens[:-1]]


def test_the_first_batches_only():
    model = build(config=CONFIG)
    found = split_loss(model, shards([100]), 2, T, "fp32", max_batches=3)
    assert (found.tokens, found.whole) == (6 * T, False)
    assert found.loss == pytest.approx(split_loss(model, [shards([100])[0][: 6 * T + 1]], 2, T, "fp32").loss)
    assert split_loss(model, shards([100]), 2, T, "fp32", max_batches=7).whole


def test_a_signal_ends_it():
    answers = iter([False, False, True])
    assert split_loss(build(config=CONFIG), shards(), 1, T, "fp32", give_up=lambda: next(answers)) is None


def test_nothing_to_predict_and_foreign_tokens():
    with pytest.raises(UserError, match="no two tokens"):
        split_loss(build(config=CONFIG), shards([1, 0]), 1, T, "fp32")
    with pytest.raises(UserError, match="token 300 at position 3"):
        split_loss(build(config=CONFIG), [np.array([1, 2, 3, 300], np.uint16)], 1, T, "fp32")


def test_counting_in_parts(monkeypatch):
    whole = evaluate.count_all(shards(), CONFIG.vocab_size)
    assert np.array_equal(whole, np.bincount(np.concatenate(shards()), minlength=CONFIG.vocab_size))
    monkeypatch.setattr(evaluate, "PART", 7)
    assert np.array_equal(evaluate.count_all(shards(), CONFIG.vocab_size), whole)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The settings of a finished run."""
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
    val = data.open_folder(run.folder.parents[1] / "data", 50257).val
    assert result["tokens"] == len(val[0]) - 1
    assert result["whole_split"]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["unigram_entropy"] == pytest.approx(data.unigram_entropy(np.bincount(val[0])))
    assert result["trained_on"] == result["fingerprint"]
    assert result["seq_len"] == run.seq_len
    assert result["ops"]["attention"] == "gpt2fast.cpu"
    assert "hellaswag" not in result
    checkpoint = run.folder / "checkpoints" / "step_00000003"
    assert evaluate.evaluate(settings(run, source=str(checkpoint)))["loss"] == result["loss"]
    train_split = evaluate.evaluate(settings(run, split="train", max_batches=2, batch_size=3))
    assert (train_split["tokens"], train_split["whole_split"]) == (2 * 3 * 16, False)


def test_other_data_is_noted(run, tmp_path):
    result = evaluate.evaluate(settings(run, data=str(tiny.write_data(tmp_path / "other", seed=1))))
    assert "trained on other data" in evaluate.table(result)
    assert "trained on other data" not in evaluate.table(evaluate.evaluate(settings(run)))


def test_hellaswag_of_a_run(run, tmp_path):
    file = write_jsonl(tmp_path / "val.jsonl")
    result = evaluate.evaluate(settings(run, data="none", from_=file, max_examples=5))
    assert result["hellaswag"]["examples"] == 5
    assert result["hellaswag"]["cut"] > 0
    assert "loss" not in result
    assert f"5 examples, {result['hellaswag']['cut']} with a shortened context" in evaluate.table(result)


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
        2, f"error: {out} exists already: choose another file with --out",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere/x/y"}, "nowhere/x/y"),
        ({"data": "none"}, "nothing to evaluate: name"),
        ({"source": "nowhere", "data": None}, "since nowhere is no run"),
        ({"data": "nowhere"}, "data nowhere does not exist"),
        ({"seq_len": 17}, "--seq-len 17 is longer than the model's block size 16"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_examples": -1}, "--max-examples is -1"),
        ({"backend": "triton", "precision": "bf16"}, "interpreter|needs a CUDA GPU|n_embd|heads"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(settings(run, **{"data": str(run.folder.parents[1] / "data")} | changes))


def test_no_validation_split(run, tmp_path):
    tiny.write_data(tmp_path / "data")
    (tmp_path / "data" / "val.bin").unlink()
    with pytest.raises(UserError, match="has no val split"):
        evaluate.evaluate(settings(run, data=str(tmp_path / "data")))


def test_where_results_cannot_be_written(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no folder to write to"):
        evaluate.evaluate(settings(run, out=tmp_path / "file" / "result.json"))
    evaluate.check_free(tmp_path / "a" / "b.json")
    assert not (tmp_path / "a").exists()  # nothing is written until there is something to write


def test_a_loss_that_is_not_finite_is_no_result(run, monkeypatch):
    monkeypatch.setattr(evaluate, "split_loss", lambda *_, **__: replace(found, loss=math.nan))
    found = evaluate.SplitLoss(1.0, 1, True)
    with pytest.raises(RunError, match="the loss is nan"):
        evaluate.evaluate(settings(run))
