"""The training step recorded as CUDA graphs and replayed: the host launches two things a step instead of hundreds.

    first     a micro-batch forward and backward, into new gradients
    next      the same, added to them; only where gradients are accumulated
    update    norm, clipping, AdamW

A replay launches the same kernels with the same addresses. So a batch is copied to where `first` and `next` read it;
gradients stay where they were made, and the next `first` writes over them; what changes from step to step, the learning
rate and the step's number, lies on the device, where the optimizer's `count` puts it before each `update`. The first
steps of a run are taken as they are: they compile, choose algorithms and fill caches, none of which can be recorded.
Recorded memory is not shared with validation and samples, which need their own.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpt2fast import optim
from gpt2fast.model import GPT
from gpt2fast.step import Batch, TrainingStep

WARM = 3  # steps that are not recorded


class GraphedStep(TrainingStep):
    """As TrainingStep; the optimizer is a TritonAdamW, whose work on the device can be recorded."""

    def __init__(self, model: GPT, optimizer: optim.TritonAdamW, **settings):
        super().__init__(model, optimizer, **settings)
        self._taken = 0
        self._replay: dict[str, Callable[[], None]] = {}

    def __call__(
        self, batches: Iterator[Batch], lr: float, give_up: Callable[[], bool] = lambda: False
    ) -> tuple[Tensor, Tensor] | None:
        if self._taken < WARM:
            self._taken += 1
            with aside(self.device):
                return super().__call__(batches, lr, give_up)
        for i in range(self.accumulation):
            if give_up():
                return None  # what was added up is written over by the next first
            batch = next(batches)
            if not self._replay:
                self._record(batch)
            for place, tensor in zip(self._batch, batch):
                place.copy_(tensor, non_blocking=True)
            self._replay["next" if i else "first"]()
        self.set_rate(lr)
        self.optimizer.count()
        self._replay["update"]()
        return self._total.clone(), self._norm.clone()

    def rehearse(self, batch: Batch) -> tuple[float, float]:
        with aside(self.device):
            return super().rehearse(batch)

    def _record(self, batch: Batch) -> None:
        self._batch = tuple(tensor.clone() for tensor in batch)
        self._total, self._norm = torch.zeros(2, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients are new, in memory that is the recording's
        self._replay["first"] = record(lambda: self._total.copy_(self.micro_batch(*self._batch)))
        if self.accumulation > 1:
            self._replay["next"] = record(lambda: self._total.add_(self.micro_batch(*self._batch)))
        self.optimizer.refresh()  # now, since a copy from the host would be recorded with it
        self._replay["update"] = record(lambda: self._norm.copy_(self.clip_and_update()))

    def clip_and_update(self) -> Tensor:
        """What the device does in an update; the norm."""
        norm = optim.clip(self.optimizer, self.grad_clip)
        self.optimizer.update()
        self.optimizer.grad_scale = None  # what clip left there
        return norm


def record(work: Callable[[], object]) -> Callable[[], None]:
    """`work`, which is not done now, as a graph. What it allocates stays its own for as long as the graph lives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """On a stream of its own: autograd remembers streams, and recording must not depend on the default one."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
