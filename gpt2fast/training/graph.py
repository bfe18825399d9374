"""The training step recorded as CUDA graphs and replayed: the host launches two things a step instead of hundreds.

    first     a micro-batch forward and backward, into new gradients
    next      the same, added to them; only where gradients are accumulated
    update    norm, clipping, AdamW

A replay launches the same kernels with the same addresses. So a batch is copied to where `first` and `next` read it;
gradients stay where they were made, and the next `first` writes over them; what changes from step to step, the learning
rate and the step's number, lies on the device, where the optimizer's `send_numbers` puts the one before each `update`,
and `update` counts the other. The first
steps of a run are taken as they are: they compile, choose algorithms and fill caches, none of which can be recorded.
The graphs share their memory, since none needs what another left but gradients, which are alive all the time;
validation and samples need their own.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpt2fast.machine.device import aside, record_graph
from gpt2fast.model import GPT
from gpt2fast.training import optim
from gpt2fast.training.step import Batch, TrainingStep

UNRECORDED = 3  # steps that are not recorded


class GraphedStep(TrainingStep):
    """As TrainingStep; the optimizer is a TritonAdamW, whose work on the device can be recorded."""

    optimizer: optim.TritonAdamW

    def __init__(self, model: GPT, optimizer: optim.AdamW, **settings):
        assert isinstance(optimizer, optim.TritonAdamW)
        super().__init__(model, optimizer, **settings)
        self._taken = 0
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def __call__(
        self, batches: Iterator[Batch], lr: float, give_up: Callable[[], bool] = lambda: False
    ) -> tuple[Tensor, Tensor] | None:
        if self._taken < UNRECORDED:
            self._taken += 1
            with aside(self.device):
                return super().__call__(batches, lr, give_up)
        for i in range(self.accumulation):
            if give_up():
                return None  # what was added up is written over by the next first
            batch = next(batches)
            if not self._graphs:
                self._record(batch)
            for buffer, tensor in zip(self._batch, batch):
                buffer.copy_(tensor, non_blocking=True)
            self._graphs["next" if i else "first"].replay()
        self.set_lr(lr)
        self.optimizer.send_numbers()
        self._graphs["update"].replay()
        return self._total.clone(), self._norm.clone()

    def rehearse(self, batch: Batch) -> tuple[float, float]:
        with aside(self.device):
            return super().rehearse(batch)

    def _record(self, batch: Batch) -> None:
        self._batch = tuple(tensor.clone() for tensor in batch)
        self._total, self._norm = torch.zeros(2, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients are new, in memory that is the recording's
        first = record_graph(lambda: self._total.copy_(self.micro_batch(*self._batch)))
        self._graphs["first"] = first
        if self.accumulation > 1:
            self._graphs["next"] = record_graph(lambda: self._total.add_(self.micro_batch(*self._batch)), first)
        self.optimizer.refresh_table()  # now, since a copy from the host would be recorded with it
        self._graphs["update"] = record_graph(lambda: self._norm.copy_(self.clip_and_update()), first)

    def clip_and_update(self) -> Tensor:
        """What the device does in an update; the norm."""
        norm = self.optimizer.gradient_norm()
        self.optimizer.update(optim.clip_divisor(norm, self.grad_clip).float())
        return norm
