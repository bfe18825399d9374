"""The blocks' matrices in the compute dtype, rounded once a step and not in every micro-batch.

Autocast rounds the fp32 weights to bf16 or fp16 in each micro-batch. Here the training step runs a twin of the model
that shares all parameters but these matrices, and has rounded copies of those. Either way every product has the same
operands, and gradients are added in fp32: tests compare the two bit for bit.

The token embedding is not copied: its rows are looked up in fp32.
"""

import copy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from gpt2fast.model import GPT

Module = TypeVar("Module", bound=nn.Module)


class Rounded:
    """A twin of the model, `model`, and its rounded matrices, `copies`: {weight in fp32: copy}.

    Each copy's gradient is added to the weight's as soon as it is computed; with `keep_gradients` it stays on the copy.
    """

    def __init__(self, original: GPT, dtype: torch.dtype, keep_gradients: bool = False):
        self.model = _twin(original)
        self.copies: dict[Tensor, nn.Parameter] = {}
        for module in self.model.h.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.dim() == 2:
                    rounded = nn.Parameter(weight.detach().to(dtype))
                    setattr(module, name, rounded)
                    self.copies[weight] = rounded
                    if not keep_gradients:
                        rounded.register_post_accumulate_grad_hook(partial(_hand_back, weight))

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights again after an update. (Their `_version` shows none: fused AdamW does not change it.)"""
        torch._foreach_copy_(list(self.copies.values()), list(self.copies))


@torch.no_grad()
def _hand_back(weight: nn.Parameter, rounded: nn.Parameter) -> None:
    assert rounded.grad is not None
    if weight.grad is None:
        weight.grad = rounded.grad.to(weight.dtype)
    else:
        weight.grad.add_(rounded.grad)
    rounded.grad = None


def _twin(module: Module) -> Module:
    """Return new modules that share the parameters of `module`."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._modules = {name: _twin(child) for name, child in module.named_children()}
    return twin
