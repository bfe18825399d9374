"""The blocks' matrices in the compute dtype, rounded once a step and not in every micro-batch.

Autocast rounds the fp32 weights to bf16 or fp16 in each micro-batch. Here the training step runs a twin of the model
that shares all of it but these matrices, of which it has rounded copies. Both ways every product sees the same
numbers, and gradients are added in fp32: tests compare them bit for bit.

The token embedding is not among them: its rows are looked up in fp32.
"""

import copy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from gpt2fast.model import GPT

Module = TypeVar("Module", bound=nn.Module)


class Rounded:
    """`model` is the twin, `copies` the twin's rounded copy of each matrix: {weight in fp32: copy}.

    Gradients go to the weights as soon as they are there; with `keep_gradients` they stay with the copies.
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
        """Round the weights again: they have changed. (Their `_version` does not tell, fused AdamW leaves it alone.)"""
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
    """The same parameters in modules of their own."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._modules = {name: _twin(child) for name, child in module.named_children()}
    return twin
