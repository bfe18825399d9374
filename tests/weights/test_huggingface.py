"""The whole model is Hugging Face's GPT-2: logits, loss and every gradient, within the rounding of float32.

The truth is theirs in float64, the base theirs in float32. A Conv1D weight there is a Linear weight transposed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast import ops
from gpt2fast.model import GPT, GPTConfig
from tests.tools.accuracy import FEW, NEARBY, assert_as_accurate
from tests.tools.hf import huggingface_model, in_our_names

transformers = pytest.importorskip("transformers", reason="the yardstick here is transformers' GPT2LMHeadModel")


def huggingface_results(model: nn.Module, idx: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logits, loss and gradients. The loss is taken from the logits, since theirs is float32 in float64 too."""
    logits = model(idx).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach()} | in_our_names(gradients)


def judged(config: GPTConfig, idx: Tensor, targets: Tensor, scale: float = 1) -> tuple[dict, dict]:
    """Truth and base, with their weights times `scale`."""
    model = huggingface_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    base = {name: result.clone() for name, result in huggingface_results(model, idx, targets).items()}
    model.zero_grad()
    return huggingface_results(model.double(), idx, targets), base


def our_results(model: GPT, idx: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = model(idx)
    loss = model(idx, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["wte.weight"] = gradients["wte.weight"][: model.config.vocab_size]
    return {"logits": logits.detach(), "loss": loss.detach()} | gradients


@pytest.mark.parametrize(
    ("config", "B", "T"),
    [
        pytest.param(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=64), 2, 8, id="one-block"),
        pytest.param(GPTConfig(n_layer=3, n_head=5, n_embd=35, block_size=19, vocab_size=211), 3, 17, id="odd"),
        pytest.param(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=4, vocab_size=7), 1, 1, id="one-token"),
        pytest.param(GPTConfig(block_size=64), 1, 16, id="124M", marks=pytest.mark.long),
    ],
)
def test_logits_loss_and_all_gradients(config, B, T):
    generator = torch.Generator().manual_seed(1)
    idx, targets = torch.randint(config.vocab_size, (2, B, T), generator=generator)
    theirs = huggingface_model(config)
    ours = GPT(config, ops.build(ops.OpsConfig()))
    weights = in_our_names(dict(theirs.named_parameters()))
    ours.load_state_dict(weights)  # strict: the names are the same, none is left over

    got = our_results(ours, idx, targets)
    truth, base = judged(config, idx, targets)
    assert set(got) == set(truth)
    nearby = [] if config.n_embd >= FEW else [judged(config, idx, targets, scale) for scale in NEARBY]
    for name in truth:
        others = [(t[name], b[name]) for t, b in nearby] if got[name].numel() < FEW else []
        assert_as_accurate(got[name], truth[name], base[name], name=name, nearby=others)
