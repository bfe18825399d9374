"""AdamW with weight decay on matrices only, and the learning rate as a pure function of the step.

Loshchilov & Hutter 2017, arXiv:1711.05101. Settings of the GPT-3 paper (arXiv:2005.14165, appendix B).
"""

import math

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def clip(optimizer: torch.optim.Optimizer, longest: float) -> Tensor:
    """The gradient's norm (0-d, on the device). The gradient is shortened to at most `longest`, now or, where the
    optimizer is fused, on its way: as for torch's GradScaler it divides by `grad_scale`, which saves a pass.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = gradient_norm(gradients)
    shorten = (norm / longest).clamp(min=1.0)
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale = shorten.float()
    else:
        torch._foreach_div_(gradients, shorten)
    return norm


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Of all gradients together, fp32. On a CPU by dot products, which read memory twice as fast as torch's norm."""
    if gradients[0].device.type == "cpu":
        return torch.stack([torch.dot(g.flatten(), g.flatten()) for g in gradients]).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)
