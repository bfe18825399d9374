"""A simulation of CUDA graphs, for tests without a GPU."""

from collections.abc import Callable
from types import SimpleNamespace

from gpt2fast.training.graph import GraphedStep


def played_by_hand(made: list[GraphedStep]) -> Callable:
    """Return a stand-in for record_graph, whose replay does the recorded work again.

    As on a GPU, work that was recorded without gradients writes new ones in each replay. Only that work is also done
    when it is recorded (here, so that gradients exist).
    """

    def record(work, other=None):
        optimizer = made[0].optimizer
        tensors = [*made[0].model.parameters(), *optimizer.copies.values()]
        new = all(tensor.grad is None for tensor in tensors)
        if new:
            work()

        def replay():
            if new:
                optimizer.zero_grad()
            work()

        return SimpleNamespace(replay=replay)

    return record
