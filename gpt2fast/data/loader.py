"""Cut batches from token shards.

Batch number i is a pure function of (shards, B, T, shuffle, seed, i), so the position of a run is one integer and
resuming needs no other state.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gpt2fast.data.shards import check_tokens, read_tokens
from gpt2fast.errors import UserError


@dataclass(frozen=True)
class Loader:
    """Batches x, y of (B, T) int64 tokens, where y is the token after x.

    Every shard is cut into windows of T + 1 tokens that overlap by one; the rest at a shard's end is not used.
    Sequential (`shuffle=False`): the windows in order, so a batch within a shard is B*T + 1 consecutive tokens.
    Shuffled: in each epoch a permutation drawn from (seed, epoch).

    UserError if the windows of all shards do not fill one batch.
    """

    shards: Sequence[np.ndarray]
    B: int
    T: int
    vocab_size: int
    shuffle: bool = False
    seed: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.batches_per_epoch == 0:
            n = max((len(tokens) for tokens in self.shards), default=0)
            raise UserError(
                f"a batch needs B*T+1 = {self.B * self.T + 1} tokens (B={self.B}, T={self.T}), and the longest shard "
                f"holds {n}: lower --batch-size or --seq-len, or prepare more text"
            )

    @cached_property
    def _ends(self) -> np.ndarray:
        """The number of windows up to the end of each shard."""
        return np.cumsum([max(0, len(tokens) - 1) // self.T for tokens in self.shards], dtype=np.int64)

    @cached_property
    def batches_per_epoch(self) -> int:
        """The number of whole batches in an epoch; the remaining windows are not used in it."""
        return int(self._ends[-1]) // self.B if len(self._ends) else 0

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        """Return batch number i, counted over all epochs: x and y, (B, T) int64, on the CPU.

        UserError if a token is outside the vocabulary, RunError if a shard was truncated meanwhile.
        """
        epoch, k = divmod(i, self.batches_per_epoch)
        windows = np.arange(k * self.B, (k + 1) * self.B)
        if self.shuffle:
            windows = self._order(epoch)[windows]
        rows = np.empty((self.B, self.T + 1), np.int64)
        for row, window in zip(rows, windows):
            shard = int(np.searchsorted(self._ends, window, side="right"))
            start = int(window - (self._ends[shard - 1] if shard else 0)) * self.T
            row[:] = read_tokens(self.shards[shard], start, start + self.T + 1)
        check_tokens(rows, self.vocab_size, f"batch {i}")
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()
            # RandomState, not Generator: NumPy guarantees its streams across versions
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
            self._orders[epoch] = random.permutation(int(self._ends[-1]))
        return self._orders[epoch]

    def batches(self, start: int, device: torch.device, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every `every`-th batch from number `start` on `device`; each is made while the one before is computed.

        On CUDA a batch is pinned and copied asynchronously: the host never waits, and torch keeps a pinned block until
        its copy is done.
        """
        ahead = self._send(self.batch(start), device)
        for i in itertools.count(start + every, every):
            current, ahead = ahead, self._send(self.batch(i), device)
            yield current

    @staticmethod
    def _send(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        if device.type == "cuda":
            x, y = (tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
        else:
            x, y = (tensor.to(device) for tensor in batch)
        return x, y
