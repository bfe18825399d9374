"""Shards in three formats; damaged ones are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.data import shards
from gpt2fast.errors import UserError
from tests.tools.shard_files import TOKENS, V, llmc_header, write_tokens

FORMATS = {"llm.c": "train.bin", "npy": "train.npy", "raw": "train.bin"}


@pytest.mark.parametrize("format", FORMATS)
def test_reads_every_format_memory_mapped(tmp_path, format):
    shard = shards.open_shard(write_tokens(tmp_path / FORMATS[format], format), V)
    assert isinstance(shard, np.memmap)
    assert np.array_equal(shard, TOKENS)


def test_our_shards_are_in_llmcs_format(tmp_path):
    assert write_tokens(tmp_path / "train.bin", "llm.c").read_bytes() == llmc_header(1000) + TOKENS.tobytes()


def corrupt(kind, path):
    """Damage a shard in one way. Return what the message must say."""
    raw = write_tokens(path, "llm.c").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4").copy()
    if kind == "truncated":
        path.write_bytes(raw[:-2])
        return r"counts 1000 tokens, which take 3024 bytes, but it has 3022"
    if kind == "padded":
        path.write_bytes(raw + b"\0\0")
        return "truncated or padded"
    if kind == "header only half there":
        path.write_bytes(raw[:100])
        return "100 bytes are less than its header of 1024"
    if kind == "negative count":
        header[2] = -5
    elif kind == "version 7":
        header[1] = 7
    elif kind == "wrong magic":
        header[0] = 20240801
    elif kind == "empty":
        path.write_bytes(b"")
        return "is empty"
    elif kind == "odd":
        path.write_bytes(TOKENS.tobytes() + b"\1")
        return "an odd number"
    elif kind == "token too large":
        write_tokens(path, "raw", np.append(TOKENS, np.uint16(V)))
        return "token 50257 at position 1000 is not below the vocabulary of 50257"
    path.write_bytes(header.tobytes() + raw[1024:])
    return {"negative count": "truncated", "version 7": "version 7", "wrong magic": "wrong magic 20240801"}[kind]


CORRUPTIONS = [
    "truncated", "padded", "header only half there", "negative count", "version 7", "wrong magic", "empty", "odd",
    "token too large",
]  # fmt: skip


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_damaged_shard_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "train.bin"
    message = corrupt(kind, path)
    with pytest.raises(UserError, match=message) as error:
        shards.open_shard(path, V)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3), np.uint16), np.zeros(9, np.int64), np.array([{}], object)], ids=["2d", "int64", "pickle"]
)
def test_other_numpy_files_are_refused(tmp_path, array):
    np.save(tmp_path / "train.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match="train.npy"):
        shards.open_shard(tmp_path / "train.npy", V)


def test_truncated_numpy_file_is_refused(tmp_path):
    path = write_tokens(tmp_path / "train.npy", "npy")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged NumPy file"):
        shards.open_shard(path, V)


def test_unreadable_file_is_refused(tmp_path):
    (tmp_path / "train.bin").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read"):
        shards.open_shard(tmp_path / "train.bin", V)


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=2000),
    suffix=st.sampled_from([".bin", ".npy"]),
    genuine=st.sampled_from(["", "llm.c", "npy"]),
)
def test_no_file_makes_the_reader_crash(tmp_path_factory, content, suffix, genuine):
    heads = {"": b"", "llm.c": np.array([20240520, 1], "<i4").tobytes(), "npy": b"\x93NUMPY\x01\x00"}
    path = tmp_path_factory.mktemp("fuzz") / f"train{suffix}"
    path.write_bytes(heads[genuine] + content)
    try:
        assert shards.open_shard(path, V).dtype == np.uint16
    except UserError as error:
        assert str(path) in str(error)
