"""AdamW with weight decay on matrices only, and the learning rate as a pure function of the step.

Loshchilov & Hutter 2017, arXiv:1711.05101. Settings of the GPT-3 paper (arXiv:2005.14165, appendix B).
"""

import math
from collections.abc import Callable
from functools import cache

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


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float] = BETAS, fused: bool = True) -> "AdamW":
    """`lr` is 0 until the training loop sets it, each step, from `learning_rate`."""
    return AdamW(decay_groups(model, weight_decay), lr=0.0, betas=betas, eps=EPS, fused=fused)


class AdamW(torch.optim.AdamW):
    """torch's, which also takes gradients from rounded copies of the weights, and rounds the weights again.

    `copies` maps a weight to its copy. Where the copy has a gradient, one compiled pass over memory converts it,
    divides it by `grad_scale`, updates moments and weight, and writes the copy; torch would make three.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.copies: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        shorten = getattr(self, "grad_scale", None)
        shorten = torch.ones(()) if shorten is None else shorten
        for group in self.param_groups:
            for weight in group["params"]:
                copy = self.copies.get(weight)
                if copy is not None and copy.grad is not None:
                    self._step_with_copy(group, weight, copy, shorten)
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None

    def _step_with_copy(self, group: dict, weight: Tensor, copy: Tensor, shorten: Tensor) -> None:
        state = self.state[weight]
        if not state:  # as torch has it
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2), lr = state["step"].item(), group["betas"], group["lr"]
        numbers = (
            beta1, beta2, group["eps"], 1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 - beta2**step
        )  # fmt: skip
        tensors = weight, copy, copy.grad, state["exp_avg"], state["exp_avg_sq"]
        _compiled(_update)(*(x.view(-1) for x in tensors), shorten, torch.tensor(numbers))


def takes_copies(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of the above, fused, and on a CPU: elsewhere `_update` is not tried yet."""
    groups = optimizer.param_groups
    return isinstance(optimizer, AdamW) and all(g["fused"] and g["params"][0].device.type == "cpu" for g in groups)


@cache
def _compiled(fn: Callable) -> Callable:
    """At its first use, for any length: torch.compile imports a lot."""
    return torch.compile(fn, dynamic=True)


def _update(w: Tensor, copy: Tensor, g: Tensor, m: Tensor, v: Tensor, shorten: Tensor, numbers: Tensor) -> None:
    """Algorithm 2 of the paper, in place; everything flat, computed in fp32."""
    beta1, beta2, eps, keep, lr, correction = numbers.unbind()
    g = g.float() / shorten
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * g * g)
    w.copy_(keep * w - lr * m / ((v / correction).sqrt() + eps))
    copy.copy_(w)


def _square_sum(g: Tensor) -> Tensor:
    return (g.float() ** 2).sum()


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
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in (*weights, *getattr(optimizer, "copies", {}).values()) if p.grad is not None]
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
        squares = [
            _compiled(_square_sum)(g) if g.dtype == torch.bfloat16 else torch.dot(g, g)
            for g in map(torch.flatten, gradients)
        ]
        return torch.stack(squares).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)
