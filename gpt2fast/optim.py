"""AdamW with weight decay on matrices only, and the learning rate as a pure function of the step.

Loshchilov & Hutter 2017, arXiv:1711.05101. Settings of the GPT-3 paper (arXiv:2005.14165, appendix B).
"""

import math

import torch
from torch import nn

BETAS = (0.9, 0.95)
EPS = 1e-8


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and LayerNorm weights do not. The tied head is in once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float] = BETAS, fused: bool = True
) -> torch.optim.AdamW:
    """`lr` is 0 until the training loop sets it, each step, from `learning_rate`."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=0.0, betas=betas, eps=EPS, fused=fused)


def learning_rate(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """Of step 0 .. total-1: linear warm-up to `peak` over `warmup` steps, then a cosine to `floor` at the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))
