"""nanoGPT's ckpt.pt: names, padded vocabulary, models without biases."""

from dataclasses import replace

import pytest
import torch

from gpt2fast.errors import UserError
from gpt2fast.model import GPTConfig
from gpt2fast.weights.foreign import read_foreign
from tests.tools.foreign_files import CONFIG, assert_same_tensors, nanogpt_checkpoint, random_tensors


def test_nanogpt(tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", CONFIG, random_tensors())
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        found = read_foreign(source)
        assert found.config == CONFIG
        assert found.where == str(tmp_path / "ckpt.pt")
        assert_same_tensors(found.tensors, random_tensors())


def test_a_model_without_biases_gets_biases_of_zero(tmp_path):
    tensors = random_tensors()
    with_weights_only = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
    nanogpt_checkpoint(tmp_path / "ckpt.pt", CONFIG, with_weights_only, bias=False)
    needed = {name: tensor * (not name.endswith(".bias")) for name, tensor in tensors.items()}
    assert_same_tensors(read_foreign(tmp_path).tensors, needed)
    nanogpt_checkpoint(tmp_path / "ckpt.pt", CONFIG, with_weights_only, bias=True)
    with pytest.raises(UserError, match="missing: h.0.ln_1.bias"):
        read_foreign(tmp_path)


def test_the_padding_of_nanogpts_vocabulary_is_left_out(tmp_path):
    config = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=2, vocab_size=50304)
    tensors = random_tensors(config)
    needed = tensors | {"wte.weight": tensors["wte.weight"][:50257]}
    nanogpt_checkpoint(tmp_path / "ckpt.pt", config, tensors)
    torch.save({f"transformer.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "state_dict.pt")
    for source in (tmp_path, tmp_path / "state_dict.pt"):
        found = read_foreign(source)
        assert found.config == replace(config, vocab_size=50257)
        assert_same_tensors(found.tensors, needed)


def test_nanogpts_arguments_must_describe_a_model(tmp_path):
    torch.save({"model": random_tensors(), "model_args": {"n_layer": 2}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="model_args describe no GPT-2"):
        read_foreign(tmp_path)
