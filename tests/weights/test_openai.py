"""OpenAI's release: a checkpoint that TensorFlow wrote is read without TensorFlow, and damage to it is found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2fast.errors import UserError
from gpt2fast.model import GPTConfig
from gpt2fast.weights import openai
from gpt2fast.weights.foreign import read_foreign
from tests.tools.foreign_files import OPENAI
from tests.tools.hostile import refused, tensorflow_block, tensorflow_table, varint


def test_openais_checkpoint_without_tensorflow():
    expected = GPTConfig(n_layer=2, n_head=3, n_embd=12, block_size=7, vocab_size=29)
    with np.load(OPENAI / "model.npz") as archive:
        stored = {name: torch.from_numpy(archive[name]) for name in archive}
    for source in (OPENAI, OPENAI / "model.ckpt.index", OPENAI / "model.npz"):
        found = read_foreign(source)
        assert found.config == expected
        assert torch.equal(found.tensors["wte.weight"], stored["model/wte"])
        assert torch.equal(found.tensors["h.1.ln_2.weight"], stored["model/h1/ln_2/g"])
        assert torch.equal(found.tensors["h.0.attn.c_attn.weight"], stored["model/h0/attn/c_attn/w"][0].T)
        assert torch.equal(found.tensors["h.1.mlp.c_proj.bias"], stored["model/h1/mlp/c_proj/b"])
    by_numpy = read_foreign(OPENAI / "model.npz").tensors
    assert all(torch.equal(tensor, by_numpy[name]) for name, tensor in read_foreign(OPENAI).tensors.items())


@pytest.fixture
def release(tmp_path) -> Path:
    return Path(shutil.copytree(OPENAI, tmp_path / "124M", ignore=shutil.ignore_patterns("*.npz")))


def test_a_flipped_byte_of_the_index_is_refused_or_harmless(release):
    index = release / "model.ckpt.index"
    whole, needed = index.read_bytes(), read_foreign(release).tensors
    refused = 0
    for i in range(len(whole)):
        index.write_bytes(whole[:i] + bytes([whole[i] ^ 0x5A]) + whole[i + 1 :])
        try:
            found = read_foreign(release).tensors
            assert all(torch.equal(tensor, needed[name]) for name, tensor in found.items())
        except UserError as error:
            assert "is damaged or not a TensorFlow checkpoint" in str(error)
            refused += 1
    assert refused > 0.9 * len(whole)


def test_missing_or_truncated_files_beside_the_index_are_refused(release):
    data = release / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="index is damaged.*in data of 16895 bytes"):
        read_foreign(release)
    data.unlink()
    with pytest.raises(UserError, match="data-00000-of-00001 cannot be read"):
        read_foreign(release)
    data.write_bytes(whole)
    (release / "hparams.json").write_text('{"n_vocab": 29}')
    with pytest.raises(UserError, match="hparams.json describes no GPT-2"):
        read_foreign(release)
    (release / "hparams.json").unlink()
    with pytest.raises(UserError, match="not a known size"):
        read_foreign(release)
    shutil.copy(release / "model.ckpt.index", release / "model-2.ckpt.index")
    with pytest.raises(UserError, match="holds 2 TensorFlow checkpoints: name one"):
        read_foreign(release)


@pytest.mark.parametrize(
    ("inner", "handles", "match"),
    [
        (tensorflow_block(varint(0) + varint(5000) + varint(0) + b"a" * 5000), 1, "a name of 5000 bytes"),
        (tensorflow_block(varint(0) + varint(900) + varint(0) + b"a" * 900), 1000, "overlapping blocks"),
        (tensorflow_block(b"\x80" * 20 + b"\1"), 1, "more than 64 bits"),
    ],
)
def test_a_tensorflow_index_that_repeats_itself_is_refused(tmp_path, inner, handles, match):
    """A name may repeat the one before it, and a block may be listed again: quadratic work from a small file."""
    (tmp_path / "a.index").write_bytes(tensorflow_table(inner, handles))
    refused(lambda: openai.read_tensorflow(tmp_path / "a.index"), match)
