"""One optimizer step: micro-batches forward and backward, clipping, AdamW. Training and benchmarks both run this."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt2fast.machine.device import DTYPES, Precision, autocast, synchronize
from gpt2fast.machine.world import ALONE, World
from gpt2fast.model import GPT
from gpt2fast.rounded import Rounded
from gpt2fast.training import optim

Batch = tuple[Tensor, Tensor]
Copies = Literal["autocast", "rounded", "written"]
"""Who rounds the blocks' matrices to the compute dtype (rounded.py).

    autocast   autocast, in each micro-batch; there are no copies
    rounded    the training step, once for all its micro-batches; gradients go to the weights
    written    the optimizer, which writes the copies as it updates the weights
"""


def compile_model(model: GPT, device: torch.device, mode: str | None = None) -> nn.Module:
    """The model by torch.compile, `mode` as there; it shares the weights of `model`, which stays uncompiled.

    On a CPU block by block: all blocks share one compilation, so that it takes seconds and not a minute; and the
    embedding's gradient stays sparse. Elsewhere whole, since launches and passes over memory weigh more there.
    """
    if device.type != "cpu":
        return torch.compile(model, dynamic=False, mode=mode)  # type: ignore[return-value]  # of a module, a module
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    blocks = [torch.compile(block, dynamic=False, mode=mode) for block in model.h]
    twin.h = nn.ModuleList(blocks)  # type: ignore[arg-type]
    return twin


def kind_of_copies(
    precision: Precision, device: torch.device, accumulation: int, compiled: bool, optimizer: str, ranks: int
) -> Copies:
    """Which copies pay. `optimizer` is "triton", "torch" (AdamW of optim.py, fused) or another.

    Several ranks leave the rounding to autocast: DDP must see the gradients where they are added up. For a single
    micro-batch copies pay only where the optimizer writes them: else they cost memory and save nothing.
    """
    if precision == "fp32" or ranks > 1:
        return "autocast"
    compiled_pass = optimizer == "torch" and device.type == "cpu" and compiled and accumulation == 1
    if precision == "bf16" and (optimizer == "triton" or compiled_pass):
        return "written"
    return "rounded" if accumulation > 1 else "autocast"


def kind_of_optimizer(optimizer: torch.optim.Optimizer) -> str:
    if isinstance(optimizer, optim.TritonAdamW):
        return "triton"
    fused = isinstance(optimizer, optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
    return "torch" if fused else "another"


class TrainingStep:
    """step(batches, lr) updates the model once and returns loss and gradient norm, without waiting for the device.

    Each of several ranks takes `accumulation` batches of its own; gradients and loss are averaged once, at the end.
    `copies` None: those that pay.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        accumulation: int = 1,
        grad_clip: float = 1.0,
        compile: bool = False,
        mode: str | None = None,
        copies: Copies | None = None,
        world: World = ALONE,
    ):
        self.model, self.optimizer = model, optimizer
        self.precision, self.accumulation, self.world = precision, accumulation, world
        self.grad_clip = grad_clip or float("inf")
        self.device = model.wte.weight.device
        self.copies = copies or kind_of_copies(
            precision, self.device, accumulation, compile, kind_of_optimizer(optimizer), world.size
        )
        written = self.copies == "written"
        self.rounded: Rounded | None = None
        if self.copies != "autocast":
            # the optimizer takes the gradients of the copies, unless they are added up, which is done in fp32
            self.rounded = Rounded(model, DTYPES[precision], keep_gradients=written and accumulation == 1)
        if isinstance(optimizer, optim.AdamW):
            optimizer.copies = dict(self.rounded.copies) if self.rounded and written else {}
        forward = self.rounded.model if self.rounded else model
        self.forward = world.replicate(compile_model(forward, self.device, mode) if compile else forward)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.forward(x, y)

    def __call__(
        self, batches: Iterator[Batch], lr: float, give_up: Callable[[], bool] = lambda: False
    ) -> tuple[Tensor, Tensor] | None:
        """Take `accumulation` batches; the mean loss and the gradient's norm before clipping, as 0-d device tensors.

        `give_up` is asked before each micro-batch; if it says yes, nothing is updated and the result is None.
        """
        total = torch.zeros((), device=self.device)
        for left in reversed(range(self.accumulation)):
            if give_up():
                self.forget_gradients()
                return None
            with self.no_sync() if left else contextlib.nullcontext():
                total += self.micro_batch(*next(batches))
        self.world.mean_(total)
        self.set_lr(lr)
        return total, self.update()

    def micro_batch(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward and backward; its share of the mean loss."""
        loss = self.loss(x, y) / self.accumulation
        self.scaler.scale(loss).backward()
        return loss.detach()

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Forward and backward within add to this rank's gradients alone."""
        return self.forward.no_sync() if isinstance(self.forward, DDP) else contextlib.nullcontext()

    def forget_gradients(self) -> None:
        """Where DDP is, they lie in its buckets, and stay there."""
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def update(self) -> Tensor:
        """Clip, step, forget the gradients; the norm before clipping. If it is not finite, the step is left out."""
        norm = optim.clip_and_step(self.optimizer, self.grad_clip, self.scaler)
        self.forget_gradients()
        if self.rounded and self.copies == "rounded":
            self.rounded.refresh()
        return norm

    def rehearse(self, batch: Batch) -> tuple[float, float]:
        """One micro-batch forward and backward, three times, changing nothing: its loss, and seconds for the third.

        What is compiled is compiled now, and what does not fit into memory fails now, before a run has begun.
        """
        if self.rounded:
            self.rounded.refresh()  # a checkpoint may have been loaded
        for _ in range(3):
            synchronize(self.device)
            start = time.perf_counter()
            with self.no_sync():
                loss = self.loss(*batch)
                loss.backward()
            synchronize(self.device)
            seconds = time.perf_counter() - start
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), seconds
