"""The model equals Hugging Face's GPT-2: logits, loss and every gradient, within the rounding of float32.

The truth is their model in float64, the base their model in float32. Conv1D's weights are Linear's, transposed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast import ops
from gpt2fast.model import GPT, GPTConfig
from tests.tools.accuracy import assert_as_accurate
from tests.tools.hf import huggingface_model, in_our_names

transformers = pytest.importorskip("transformers", reason="the yardstick here is transformers' GPT2LMHeadModel")


def huggingface_results(model: nn.Module, idx: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return logits, loss and gradients. The loss is computed from the logits, since their own is always float32."""
    logits = model(idx).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach()} | in_our_names(gradients)


def our_results(model: GPT, idx: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = model(idx)
    loss = model(idx, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["wte.weight"] = gradients["wte.weight"][: model.config.vocab_size]
    return {"logits": logits.detach(), "loss": loss.detach()} | gradients


def results(config: GPTConfig, idx: Tensor, targets: Tensor, seed: int) -> tuple[dict, dict, dict]:
    """Return the results of our model, of theirs in float64, and of theirs in float32, for the same random weights."""
    theirs = huggingface_model(config, seed)
    ours = GPT(config, ops.build(ops.OpsConfig()))
    ours.load_state_dict(in_our_names(dict(theirs.named_parameters())))  # strict: the same names, and no others
    got = our_results(ours, idx, targets)
    base = {name: result.clone() for name, result in huggingface_results(theirs, idx, targets).items()}
    theirs.zero_grad()
    return got, huggingface_results(theirs.double(), idx, targets), base


@pytest.mark.parametrize(
    ("config", "B", "T", "models"),
    [
        pytest.param(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=64), 2, 8, 16, id="one-block"),
        pytest.param(GPTConfig(n_layer=3, n_head=5, n_embd=35, block_size=19, vocab_size=211), 3, 17, 16, id="odd"),
        pytest.param(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=4, vocab_size=7), 1, 1, 16, id="one-token"),
        pytest.param(GPTConfig(block_size=64), 1, 16, 1, id="124M", marks=pytest.mark.long),
    ],
)
def test_logits_loss_and_all_gradients(config, B, T, models):
    """Over several models if one has too few numbers to measure rounding by."""
    generator = torch.Generator().manual_seed(1)
    idx, targets = torch.randint(config.vocab_size, (2, B, T), generator=generator)
    drawn = [results(config, idx, targets, seed) for seed in range(models)]
    assert set(drawn[0][0]) == set(drawn[0][1])
    for name in drawn[0][1]:
        got, truth, base = (torch.stack([each[name] for each in kind]) for kind in zip(*drawn))
        assert_as_accurate(got, truth, base, name=name)
