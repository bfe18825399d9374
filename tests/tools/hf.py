"""transformers' GPT-2 with random weights, and its tensors in our names."""

import pytest
from torch import Tensor, nn

from gpt2fast.model import GPTConfig
from tests.tools.foreign_files import TRANSPOSED
from tests.tools.inputs import randomise

transformers = pytest.importorskip("transformers", reason="the tests compare with transformers' GPT2LMHeadModel")


def huggingface_model(config: GPTConfig, seed: int = 0) -> nn.Module:
    """Return their GPT-2 with all weights random, since a lost bias would not be noticed if biases were zero."""
    settings = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    assert settings.activation_function == "gelu_new"
    model = transformers.GPT2LMHeadModel(settings)
    randomise(model, 0.05, seed)
    return model


def in_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("transformer."): tensor.T if name.endswith(TRANSPOSED) else tensor
        for name, tensor in tensors.items()
    }
