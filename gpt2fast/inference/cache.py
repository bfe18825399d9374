"""Keys and values of all tokens so far: a new token costs one reading of the weights, and none is computed again.

For each block (B, H, S, D) of either, S positions allocated at once: 37 kB a token of GPT-2 124M in bf16, so 38 MB for
a row of 1024, beside 249 MB of weights.
"""

from functools import partial

import torch
from torch import Tensor

from gpt2fast.model import GPT, Attend

ALIGNED = 64  # positions: torch's attention copies masks of other lengths to align them


class Cache:
    """Of B rows and at least `positions` positions, in the compute dtype.

    `filling` and `reading` are for `GPT.hidden`: what each block does where it would call ops.attention.
    """

    def __init__(self, model: GPT, B: int, positions: int, dtype: torch.dtype):
        c = model.config
        self.ops = model.ops
        S = -(-positions // ALIGNED) * ALIGNED
        shape = (c.n_layer, B, c.n_head, S, c.n_embd // c.n_head)
        # zeros: the weight of a position not yet written is zero, and zero times NaN would be NaN
        self.k = torch.zeros(shape, dtype=dtype, device=model.wte.weight.device)
        self.v = torch.zeros_like(self.k)

    def filling(self) -> list[Attend]:
        """Causal attention on (B, T, 3C), whose keys and values become those of positions 0 to T - 1.

        Rows shorter than T are padded behind their end. Causal: their tokens never see the padding; and its keys are
        written over before a later token may look at them.
        """
        return [partial(self._fill, layer) for layer in range(len(self.k))]

    def reading(self, position: Tensor) -> list[Attend]:
        """Attention of one new token a row, at position (B,): (1, B, 3C) -> (1, B, C)."""
        return [partial(self._read, layer, position) for layer in range(len(self.k))]

    def _fill(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        B, T, C3 = qkv.shape
        _, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        self.k[layer, :, :, :T], self.v[layer, :, :, :T] = k, v
        return self.ops.attention(qkv, n_head)

    def _read(self, layer: int, position: Tensor, qkv: Tensor, n_head: int) -> Tensor:
        return self.ops.cached_attention(qkv[0], self.k[layer], self.v[layer], position, n_head)[None]
