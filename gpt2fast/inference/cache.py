"""The cache of keys and values: a new token costs one pass over the weights, and no token is computed twice.

Each block has keys and values of (B, H, S, D), with all S positions allocated at once: 37 kB per token for GPT-2 124M
in bf16, so 38 MB for a row of 1024, next to 249 MB of weights.
"""

from functools import partial

import torch
from torch import Tensor

from gpt2fast.model import GPT, Attend

ALIGNED = 64  # S is a multiple of this: torch's attention copies masks of other lengths to align them


class Cache:
    """Keys and values of B rows and at least `positions` positions, in the compute dtype.

    `filling` and `reading` return the `attends` of `GPT.hidden`: what each block calls instead of ops.attention.
    """

    def __init__(self, model: GPT, B: int, positions: int, dtype: torch.dtype):
        c = model.config
        self.ops = model.ops
        S = -(-positions // ALIGNED) * ALIGNED
        shape = (c.n_layer, B, c.n_head, S, c.n_embd // c.n_head)
        # zeros, not empty: an unwritten position has weight zero, and zero times NaN is NaN
        self.k = torch.zeros(shape, dtype=dtype, device=model.wte.weight.device)
        self.v = torch.zeros_like(self.k)

    def filling(self) -> list[Attend]:
        """Return causal attention on (B, T, 3C) that stores its keys and values at positions 0 to T - 1.

        Rows shorter than T are padded at the end. Attention is causal, so their tokens never see the padding, and its
        keys are overwritten before a later token may attend to them.
        """
        return [partial(self._fill, layer) for layer in range(len(self.k))]

    def reading(self, position: Tensor) -> list[Attend]:
        """Return attention for one new token per row, at `position` (B,): (1, B, 3C) -> (1, B, C)."""
        return [partial(self._read, layer, position) for layer in range(len(self.k))]

    def _fill(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        B, T, C3 = qkv.shape
        _, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        self.k[layer, :, :, :T], self.v[layer, :, :, :T] = k, v
        return self.ops.attention(qkv, n_head)

    def _read(self, layer: int, position: Tensor, qkv: Tensor, n_head: int) -> Tensor:
        return self.ops.cached_attention(qkv[0], self.k[layer], self.v[layer], position, n_head)[None]
