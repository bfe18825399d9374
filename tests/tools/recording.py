"""CUDA graphs played by hand, where there is no GPU."""

from collections.abc import Callable
from types import SimpleNamespace

from gpt2fast.training.graph import GraphedStep


def played_by_hand(made: list[GraphedStep]) -> Callable:
    """In the place of graph.record: what was recorded is done again. As on a GPU, the work that found no gradient
    writes new ones each time, and nothing but that work is done when it is recorded (here, to have gradients)."""

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
