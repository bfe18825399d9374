"""The training step recorded as CUDA graphs and replayed: the host launches two graphs a step, not hundreds of kernels.

    first     a micro-batch forward and backward, which writes the gradients
    next      the same, which adds to them; only where gradients are accumulated
    update    norm, clipping, AdamW

A replay launches the same kernels with the same addresses. So each batch is copied to where `first` and `next` read it,
and gradients keep their memory, which the next `first` overwrites. What changes from step to step is in device memory:
the learning rate, which the optimizer's `send_numbers` writes before each `update`, and the number of the step, which
`update` counts.

The first steps of a run are not recorded: they compile, choose algorithms and fill caches, and none of that can be
recorded. The graphs share their memory pool: the only tensors that one needs from another are gradients, which are
never freed. Validation and samples run outside of it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpt2fast.machine.device import aside, record_graph
from gpt2fast.model import GPT
from gpt2fast.training import optim
from gpt2fast.training.step import Batch, TrainingStep

UNRECORDED = 3  # the first steps of a run, which are not recorded


class GraphedStep(TrainingStep):
    """A TrainingStep that is recorded. The optimizer is a TritonAdamW, whose work on the device can be recorded."""

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
                return None  # the next `first` overwrites the gradients
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
        self.optimizer.zero_grad(set_to_none=True)  # gradients must be allocated in the graphs' pool
        first = record_graph(lambda: self._total.copy_(self.micro_batch(*self._batch)))
        self._graphs["first"] = first
        if self.accumulation > 1:
            self._graphs["next"] = record_graph(lambda: self._total.add_(self.micro_batch(*self._batch)), first)
        self.optimizer.refresh_table()  # now, or its copy from the host would be recorded too
        self._graphs["update"] = record_graph(lambda: self._norm.copy_(self.clip_and_update()), first)

    def clip_and_update(self) -> Tensor:
        """Do what the device does in an update. Return the norm before clipping."""
        norm = self.optimizer.gradient_norm()
        self.optimizer.update(optim.clip_divisor(norm, self.grad_clip).float())
        return norm
