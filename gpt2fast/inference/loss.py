"""Compute the loss over a whole split.

Windows of T tokens follow one another: every token except a shard's first is predicted once, and the rest of a shard is
a shorter window, padded. So the loss is the exact mean over tokens. A window has no memory of the one before it, as in
training.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from gpt2fast.data.shards import check_tokens, read_tokens
from gpt2fast.errors import UserError
from gpt2fast.machine.device import Precision, autocast
from gpt2fast.machine.world import ALONE, World
from gpt2fast.model import GPT
from gpt2fast.reference import IGNORE


@dataclass(frozen=True)
class SplitLoss:
    """The mean loss in nats over `tokens` predicted tokens; `whole` if that is every token of the split."""

    loss: float
    tokens: int
    whole: bool


@torch.no_grad()
def split_loss(
    model: GPT,
    shards: Sequence[np.ndarray],
    B: int,
    T: int,
    precision: Precision,
    *,
    max_batches: int | None = None,
    give_up: Callable[[], bool] = lambda: False,
    progress: bool = False,
    world: World = ALONE,
) -> SplitLoss | None:
    """Compute the exact mean loss over `shards`, or over their first `max_batches` batches of (B, T).

    The ranks share the batches. None if `give_up`, called before each batch, returns True on any rank. UserError if
    there is nothing to predict, or a token is outside the vocabulary.
    """
    total = sum(max(0, len(tokens) - 1) for tokens in shards)
    if not total:
        raise UserError("the split holds no two tokens in a row, so there is nothing to predict: prepare more text")
    device, losses, done, given_up = model.wte.weight.device, 0.0, 0, False
    expected = total if max_batches is None else min(total, max_batches * B * T)
    with tqdm(
        total=expected // world.size,
        desc="loss",
        unit=" tokens",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5,
    ) as bar:
        for x, y in _batches(
            shards, B, T, model.config.vocab_size, range(world.rank, max_batches or sys.maxsize, world.size)
        ):
            given_up = give_up()
            if given_up:
                break
            n = int((y != IGNORE).sum())
            with autocast(device, precision):
                loss = model(x.to(device), y.to(device)).item()
            losses, done = losses + n * loss, done + n
            bar.update(n)
            bar.set_postfix_str(f"loss {losses / done:.4f}")
    summed, count, gave_up = world.totals(losses, done, given_up)
    return None if gave_up else SplitLoss(summed / count, int(count), count == total)


def _batches(
    shards: Sequence[np.ndarray], B: int, T: int, vocab_size: int, numbers: range
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield x, y of (B, T) int64 in the order of the shards; the last has fewer rows. After a shard's end y is IGNORE.

    `numbers`: the batches to yield.
    """
    windows = (read_tokens(tokens, i, i + T + 1) for tokens in shards for i in range(0, len(tokens) - 1, T))
    for number in itertools.count():
        rows = list(itertools.islice(windows, B))
        if not rows or number >= numbers.stop:
            return
        if number not in numbers:
            continue
        x, y = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), IGNORE, np.int64)
        for i, row in enumerate(rows):
            check_tokens(row, vocab_size, f"batch {number}")
            x[i, : len(row) - 1], y[i, : len(row) - 1] = row[:-1], row[1:]
        yield torch.from_numpy(x), torch.from_numpy(y)
