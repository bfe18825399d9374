"""One optimizer step, in training and in benchmarks: micro-batches forward and backward, clipping, AdamW."""

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
"""Where the blocks' matrices are rounded to the compute dtype (rounded.py).

    autocast   by autocast, in each micro-batch; there are no copies
    rounded    by the training step, once for all its micro-batches; gradients go to the weights
    written    by the optimizer, which writes the copies as it updates the weights
"""


def compile_model(model: GPT, device: torch.device, mode: str | None = None) -> nn.Module:
    """Return the model compiled by torch.compile with `mode`. It shares the weights of `model`, which is not changed.

    On a CPU each block is compiled by itself: all blocks share one compilation, which then takes seconds and not a
    minute, and the embedding's gradient stays sparse. Elsewhere the model is compiled as a whole, since launches and
    passes over memory cost more there.
    """
    if device.type != "cpu":
        return torch.compile(model, dynamic=False, mode=mode)  # type: ignore[return-value]  # a module gives a module
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    blocks = [torch.compile(block, dynamic=False, mode=mode) for block in model.h]
    twin.h = nn.ModuleList(blocks)  # type: ignore[arg-type]
    return twin


def kind_of_copies(
    precision: Precision, device: torch.device, accumulation: int, compiled: bool, optimizer: str, ranks: int
) -> Copies:
    """Return the fastest kind of copies. `optimizer` is "triton", "torch" (AdamW of optim.py, fused) or another.

    With several ranks autocast rounds: DDP must see the gradients of the weights that it averages. With one micro-batch
    copies pay only if the optimizer writes them: else they cost memory and save nothing.
    """
    if precision == "fp32" or ranks > 1:
        return "autocast"
    compiled_pass = optimizer == "torch" and device.type == "cpu" and compiled and accumulation == 1
    if precision == "bf16" and (optimizer == "triton" or compiled_pass):
        return "written"
    return "rounded" if accumulation > 1 else "autocast"


def kind_of_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the optimizer for `kind_of_copies`."""
    if isinstance(optimizer, optim.TritonAdamW):
        return "triton"
    fused = isinstance(optimizer, optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
    return "torch" if fused else "another"


class TrainingStep:
    """The callable that updates the model once: step(batches, lr) returns loss and gradient norm, on the device.

    The host does not wait for the device. Each of several ranks takes `accumulation` batches of its own; gradients and
    loss are averaged once, at the end. `copies` None: as `kind_of_copies` says.
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
            # the optimizer takes the gradients of the copies, unless several are added, which needs fp32
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
        """Take `accumulation` batches and update the model. Return the mean loss and the gradient norm before clipping,
        as 0-d tensors on the device.

        `give_up` is called before each micro-batch; if it returns True, nothing is updated and the result is None.
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
        """Run forward and backward. Return the micro-batch's share of the mean loss."""
        loss = self.loss(x, y) / self.accumulation
        self.scaler.scale(loss).backward()
        return loss.detach()

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Return a context in which backward adds to this rank's gradients and DDP does not average them."""
        return self.forward.no_sync() if isinstance(self.forward, DDP) else contextlib.nullcontext()

    def forget_gradients(self) -> None:
        """Set gradients to None, or with DDP, whose buckets hold them, to zero."""
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def update(self) -> Tensor:
        """Clip, step, and forget the gradients. Return the norm before clipping; if it is not finite, the step is
        skipped."""
        norm = optim.clip_and_step(self.optimizer, self.grad_clip, self.scaler)
        self.forget_gradients()
        if self.rounded and self.copies == "rounded":
            self.rounded.refresh()
        return norm

    def rehearse(self, batch: Batch) -> tuple[float, float]:
        """Run a micro-batch forward and backward three times. Return its loss, and the seconds of the third time.

        The model is not changed. Compilation happens now, and too little memory is noticed now, before the run begins.
        """
        if self.rounded:
            self.rounded.refresh()  # weights may be those of a checkpoint, loaded since
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
