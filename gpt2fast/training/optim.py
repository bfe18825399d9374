"""AdamW with weight decay of matrices only, and the learning rate as a pure function of the step.

Source: Loshchilov & Hutter 2017, arXiv:1711.05101; settings of the GPT-3 paper (arXiv:2005.14165, appendix B).
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gpt2fast.machine.world import ALONE, World, shard, unwrapped

BETAS = (0.9, 0.95)
EPS = 1e-8
ROW = 1024  # numbers of a gradient whose squares are summed first


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups: matrices and embeddings, which decay; biases and LayerNorm weights, which do not.

    The tied head is in the first group once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    fused: bool = True,
    kernels: ModuleType | None = None,
    world: World = ALONE,
) -> "AdamW":
    """Make the optimizer: TritonAdamW with `kernels` (from ops.kernels), else AdamW.

    `lr` is 0 until the training loop sets it, in each step, from `learning_rate`. With several ranks in `world` ZeRO-1
    divides the state among them: what is returned is then a ZeroRedundancyOptimizer around such an optimizer.
    """
    kind = AdamW if kernels is None else partial(TritonAdamW, kernels)
    make: Callable[..., AdamW] = kind if world.size == 1 else partial(shard, kind, world=world)
    return make(decay_groups(model, weight_decay), lr=0.0, betas=betas, eps=EPS, fused=fused)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which also takes gradients from rounded copies of the weights, and rounds the weights again.

    `copies` maps a weight to its copy. If the copy has a gradient, one compiled pass over memory converts it, divides
    it by `grad_scale`, updates moments and weight, and writes the copy; torch would make three passes.

    If `found_inf` is 1, the step is skipped: weights, copies, moments and "step" stay as they are.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.copies: dict[Tensor, nn.Parameter] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would compute the loss again
        divisor = torch.ones(()) if self.grad_scale is None else self.grad_scale
        for group in self.param_groups:
            for weight in group["params"]:
                copy = self.copies.get(weight)
                # copies have gradients on a CPU only, where reading found_inf needs no synchronization
                if copy is not None and copy.grad is not None and not self.found_inf:
                    self._step_with_copy(group, weight, copy, divisor)
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the state of a weight, made as torch's fused AdamW makes it."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state

    def _step_with_copy(self, group: dict, weight: Tensor, copy: Tensor, divisor: Tensor) -> None:
        assert copy.grad is not None
        state = self._state(weight)
        state["step"] += 1
        step, (beta1, beta2), lr = state["step"].item(), group["betas"], group["lr"]
        numbers = (
            beta1, beta2, group["eps"], 1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 - beta2**step
        )  # fmt: skip
        tensors = weight, copy, copy.grad, state["exp_avg"], state["exp_avg_sq"]
        _compile(_update_weight)(*(x.view(-1) for x in tensors), divisor, torch.tensor(numbers))


class TritonAdamW(AdamW):
    """The same in one launch over all weights, with or without copies: kernels/adamw.py.

    `step` is `send_numbers`, the host's work, which does not wait for the device, and `update`, the device's work: a
    captured graph of `update` finds the numbers of each step where `send_numbers` puts them. If the divisor of the
    gradients is not finite, `update` skips the step; so "step" is counted on the device.

    Not for fp16: GradScaler makes a pass of its own over the gradients, and skips the step if one is infinite. torch's
    fused AdamW checks that on the device; here GradScaler would make the host wait for it.
    """

    def __init__(self, kernels: ModuleType, *args, **options):
        super().__init__(*args, **options)
        self._step_supports_amp_scaling = False  # GradScaler's protocol
        self._kernels = kernels
        self._table = kernels.ParameterTable(self._weights()[0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.send_numbers()
        self.update(self.grad_scale)

    @torch.no_grad()
    def send_numbers(self) -> None:
        """Copy the settings of every weight that has a gradient to the device."""
        settings = [
            (*group["betas"], group["eps"], group["lr"], group["weight_decay"]) for group, *_ in self._with_gradients()
        ]
        if settings:
            beta1, beta2, eps, lr, decay = torch.tensor(settings, dtype=torch.float64).unbind(1)
            numbers = 1 - beta1, 1 - beta2, eps, lr * decay, lr, beta1.log2(), beta2.log2()
            self._table.set_numbers(torch.stack(numbers, 1))

    @torch.no_grad()
    def update(self, divisor: Tensor | None = None) -> None:
        """Update weights, moments and copies by gradients / `divisor`; do nothing if `divisor` is not finite."""
        self.refresh_table()
        self._kernels.adamw_(self._table, torch.ones((), device=self._table.device) if divisor is None else divisor)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients (0-d, fp32, on the device)."""
        self.refresh_table()
        return self._kernels.gradient_norm(self._table)

    def refresh_table(self) -> None:
        """Bring the kernels' table of addresses up to date: gradients may move in each step, and moments when a
        checkpoint is loaded."""
        rows = []
        for _, weight, holder, state in self._with_gradients():
            assert holder.grad is not None
            if not holder.grad.is_contiguous():
                holder.grad = holder.grad.contiguous()
            moments = state["exp_avg"], state["exp_avg_sq"]
            rows.append((holder.grad, weight, *moments, self.copies.get(weight), state["step"]))
        self._table.refresh(rows)

    def _weights(self) -> list[nn.Parameter]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def _with_gradients(self) -> Iterator[tuple[dict, Tensor, Tensor, dict[str, Tensor]]]:
        """Yield (group, weight, the one of weight and copy that has the gradient, state)."""
        for group in self.param_groups:
            for weight in group["params"]:
                copy = self.copies.get(weight)
                holder = weight if copy is None or copy.grad is None else copy
                if holder.grad is not None:
                    yield group, weight, holder, self._state(weight)


@cache
def _compile(fn: Callable) -> Callable:
    """Compile `fn` at its first use, since torch.compile imports a lot; for tensors of any length."""
    return torch.compile(fn, dynamic=True)


def _update_weight(w: Tensor, copy: Tensor, g: Tensor, m: Tensor, v: Tensor, divisor: Tensor, numbers: Tensor) -> None:
    """Update flat tensors in place by algorithm 2 of the paper, computed in fp32."""
    beta1, beta2, eps, keep, lr, correction = numbers.unbind()
    g = g.float() / divisor
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * g * g)
    w.copy_(keep * w - lr * m / ((v / correction).sqrt() + eps))
    copy.copy_(w)


def _rows_and_rest(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat `g` as rows of ROW numbers, and the rest of it."""
    whole = len(g) // ROW
    return g[: whole * ROW].view(whole, ROW), g[whole * ROW :]


def _square_sum(g: Tensor) -> Tensor:
    rows, rest = _rows_and_rest(g)
    return (rows.float() ** 2).sum(1).sum() + (rest.float() ** 2).sum()


def learning_rate(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """Return the rate of `step`, 0 to total-1: linear warm-up to `peak` in `warmup` steps, then a cosine to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def clip_and_step(
    optimizer: torch.optim.Optimizer, max_norm: float, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    """Clip the gradient to a norm of at most `max_norm`, and step. Return the norm before (0-d, on the device).

    If the norm is not finite, the step is skipped. A fused optimizer divides the gradients by its attribute
    `grad_scale` in the same pass, and skips the step if `found_inf` is 1 (TritonAdamW: if `grad_scale` is not finite),
    so that the host does not wait for the device. Both are attributes because torch's fused AdamW gets them in this way
    from GradScaler. An optimizer that is not fused gets clipped gradients, or none.
    """
    if scaler:
        scaler.unscale_(optimizer)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in (*weights, *getattr(optimizer, "copies", {}).values()) if p.grad is not None]
    norm = optimizer.gradient_norm() if isinstance(optimizer, TritonAdamW) else gradient_norm(gradients)
    local: Any = unwrapped(optimizer)
    if all(group.get("fused") for group in optimizer.param_groups):
        local.grad_scale = clip_divisor(norm, max_norm).float()
        if not isinstance(local, TritonAdamW):
            local.found_inf = (~norm.isfinite()).float()
    else:
        torch._foreach_div_(gradients, clip_divisor(norm, max_norm))
        if not norm.isfinite():
            optimizer.zero_grad(set_to_none=True)
    try:
        scaler.step(optimizer) if scaler else optimizer.step()
    finally:
        local.grad_scale = local.found_inf = None
    if scaler:
        scaler.update()
    return norm


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the number to divide the gradient by; not finite if the norm is not, even for a `max_norm` of inf."""
    return (norm / max_norm).clamp(min=1.0)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together, in fp32.

    On a CPU rows of ROW numbers are summed first: torch's sum over 38 M numbers at once has an error of 1e-3, and so
    has BLAS's dot product, with other bits for another number of threads. With rows it is 1e-7, at the same speed.
    """
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    squares = []
    for g in map(torch.flatten, gradients):
        if g.dtype == torch.bfloat16:
            squares.append(_compile(_square_sum)(g))
        else:
            rows, rest = _rows_and_rest(g)
            squares.append(torch.linalg.vector_norm(rows, dim=1).square().sum() + torch.dot(rest, rest))
    return torch.stack(squares).sum().sqrt()
