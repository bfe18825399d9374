"""OpenAI's release: a checkpoint that TensorFlow wrote is read without TensorFlow, and no damage to it goes unseen."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2fast import weights
from gpt2fast.errors import UserError
from gpt2fast.model import GPTConfig

OPENAI = Path(__file__).parent / "openai_tf"


def test_openais_checkpoint_without_tensorflow():
    expected = GPTConfig(n_layer=2, n_head=3, n_embd=12, block_size=7, vocab_size=29)
    with np.load(OPENAI / "model.npz") as archive:
        stored = {name: torch.from_numpy(archive[name]) for name in archive}
    for source in (OPENAI, OPENAI / "model.ckpt.index", OPENAI / "model.npz"):
        found = weights.read(source)
        assert found.config == expected
        assert torch.equal(found.tensors["wte.weight"], stored["model/wte"])
        assert torch.equal(found.tensors["h.1.ln_2.weight"], stored["model/h1/ln_2/g"])
        assert torch.equal(found.tensors["h.0.attn.c_attn.weight"], stored["model/h0/attn/c_attn/w"][0].T)
        assert torch.equal(found.tensors["h.1.mlp.c_proj.bias"], stored["model/h1/mlp/c_proj/b"])
    by_numpy = weights.read(OPENAI / "model.npz").tensors
    assert all(torch.equal(tensor, by_numpy[name]) for name, tensor in weights.read(OPENAI).tensors.items())


@pytest.fixture
def openai(tmp_path) -> Path:
    return Path(shutil.copytree(OPENAI, tmp_path / "124M", ignore=shutil.ignore_patterns("*.npz")))


def test_a_flipped_byte_of_the_index_is_refused_or_does_not_matter(openai):
    index = openai / "model.ckpt.index"
    whole, needed = index.read_bytes(), weights.read(openai).tensors
    refused = 0
    for i in range(len(whole)):
        index.write_bytes(whole[:i] + bytes([whole[i] ^ 0x5A]) + whole[i + 1 :])
        try:
            found = weights.read(openai).tensors
            assert all(torch.equal(tensor, needed[name]) for name, tensor in found.items())
        except UserError as error:
            assert "is damaged or no TensorFlow checkpoint" in str(error)
            refused += 1
    assert refused > 0.9 * len(whole)


def test_what_is_missing_or_cut_beside_the_index_is_refused(openai):
    data = openai / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="index is damaged.*in data of 16895 bytes"):
        weights.read(openai)
    data.unlink()
    with pytest.raises(UserError, match="data-00000-of-00001 cannot be read"):
        weights.read(openai)
    data.write_bytes(whole)
    (openai / "hparams.json").write_text('{"n_vocab": 29}')
    with pytest.raises(UserError, match="hparams.json describes no GPT-2"):
        weights.read(openai)
    (openai / "hparams.json").unlink()
    with pytest.raises(UserError, match="no size that is known"):
        weights.read(openai)
    shutil.copy(openai / "model.ckpt.index", openai / "model-2.ckpt.index")
    with pytest.raises(UserError, match="holds 2 TensorFlow checkpoints: name one"):
        weights.read(openai)
