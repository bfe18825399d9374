"""Attention of one new token per row to earlier keys and values in a cache, for generating text. It has no backward.

    k_cache[p], v_cache[p] = k, v        p: the row's position
    o = sum_j w_j v_j / sum_j w_j,       w_j = exp(q k_j / sqrt(D)),  j = 0 .. p

Shapes    qkv (B, 3C), o (B, C): heads of D = C / n_head side by side;  k_cache, v_cache (B, H, S, D);  position (B,)
          int64. D from 16 to 256, padded to a power of two in the kernel. Rows may be at different positions: a program
          reads the keys of its own row up to its position, so the rest of the cache does not matter.
Traffic   4 B C (p + 1) bytes of a half type: keys and values once, 3 MB per layer of GPT-2 124M at B=1, p=1023, where
          the layer's weights are 14 MB. Two operations per byte, so no tensor cores.
Programs  One for each row and head; keys are not split. At B=8, 96 programs are as many as most GPUs have processors.
          At B=1 there are 12, which, with 64 kB in flight each, take as long for 1024 keys as reading the layer's
          weights takes (estimated, not measured). A split needs a second kernel that adds up the parts, for a third to
          two thirds of that time in each layer, at any length: it would gain only at the end of a long text at B=1.
Softmax   Each of BLOCK_N lanes is an online softmax of its own over keys lane, lane + BLOCK_N, ...: in the loop only
          q k crosses threads. The lanes and the new token, which is not read back, are added up once, at the end, in
          one order: the same bits every time, whatever the other rows are.
Numerics  All in fp32 and base 2, rounded once. A position outside the cache is never used as an address: the row of o
          is NaN.
Source    Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels import launch
from gpt2fast.kernels.attention_forward import D_RANGE, LOG2_E
from gpt2fast.kernels.registration import autocast, check_device, check_shape, check_tensors, op

LEAST = tl.constexpr(-3e38)  # the maximum of a lane that has seen no key: with minus infinity, m - m_new would be NaN


@triton.jit
def _cached_attention_kernel(
    qkv_ptr, k_cache_ptr, v_cache_ptr, position_ptr, o_ptr, H, S, D, qk_scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # counted over all rows
    row, C = head // H, H * D
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    qkv_ptr += row * 3 * C + (head % H) * D
    k_cache_ptr += head * S * D
    v_cache_ptr += head * S * D
    q = tl.load(qkv_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32) * qk_scale
    k_new = tl.load(qkv_ptr + C + offs_d, mask=mask_d, other=0.0)
    v_new = tl.load(qkv_ptr + 2 * C + offs_d, mask=mask_d, other=0.0)
    position = tl.load(position_ptr + row)
    known = (position >= 0) & (position < S)
    mask_new = offs_d < tl.where(known, D, 0)
    tl.store(k_cache_ptr + position * D + offs_d, k_new, mask=mask_new)
    tl.store(v_cache_ptr + position * D + offs_d, v_new, mask=mask_new)

    # per lane: the largest score, the sum of weights, the sum of weights times v
    m = tl.full((BLOCK_N,), LEAST, dtype=tl.float32)
    l = tl.zeros((BLOCK_N,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, tl.where(known, position, 0), BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < position
        offs, mask = offs_n[:, None] * D + offs_d[None, :], mask_n[:, None] & mask_d[None, :]
        k = tl.load(k_cache_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_cache_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(mask_n, tl.sum(q[None, :] * k, axis=1), float("-inf"))
        m_new = tl.maximum(m, s)
        alpha, w = tl.exp2(m - m_new), tl.exp2(s - m_new)
        l = l * alpha + w
        acc = acc * alpha[:, None] + w[:, None] * v
        m = m_new

    s_new = tl.sum(q * k_new.to(tl.float32), axis=0)
    most = tl.maximum(tl.max(m, axis=0), s_new)
    alpha, w_new = tl.exp2(m - most), tl.exp2(s_new - most)
    total = tl.sum(l * alpha, axis=0) + w_new
    o = (tl.sum(acc * alpha[:, None], axis=0) + w_new * v_new.to(tl.float32)) / total
    tl.store(o_ptr + head * D + offs_d, tl.where(known, o, float("nan")), mask=mask_d)


@op(
    "cached_attention_",
    mutates=("k_cache", "v_cache"),
    fake=lambda qkv, k_cache, v_cache, position, n_head: qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3)),
)
def cached_attention_(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, n_head: int) -> Tensor:
    """Return o (B, C)."""
    (B, C3), S = qkv.shape, k_cache.shape[2]
    o, D = qkv.new_empty((B, C3 // 3)), k_cache.shape[3]
    if B:
        BLOCK_D = max(16, triton.next_power_of_2(D))
        _cached_attention_kernel[(B * n_head,)](
            qkv_ptr=qkv.contiguous(), k_cache_ptr=k_cache, v_cache_ptr=v_cache, position_ptr=position.contiguous(),
            o_ptr=o, H=n_head, S=S, D=D, qk_scale=D**-0.5 * LOG2_E, BLOCK_D=BLOCK_D,
            **launch.cached_attention(BLOCK_D, qkv.dtype)._asdict(),
        )  # fmt: skip
    return o


def cached_attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, n_head: int) -> Tensor:
    """Attend with one new token per row, qkv (B, 3C) at `position` (B,) int64 -> (B, C). Its key and value are written
    to the caches (B, H, S, D), which must be contiguous and of the compute dtype.

    Under autocast qkv is cast to its dtype. ValueError on shapes, D outside 16 to 256 and devices; TypeError on dtypes;
    RuntimeError if a gradient is needed.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise RuntimeError("cached_attention: it has no backward: call it under torch.no_grad()")
    (qkv,) = autocast(qkv)
    check_tensors("cached_attention", same_dtype=True, qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    check_device("cached_attention", "qkv", qkv, "position", position)
    if qkv.dim() != 2 or n_head < 1 or qkv.shape[1] % (3 * n_head):
        raise ValueError(f"cached_attention: qkv has shape {tuple(qkv.shape)}: it must be (B, 3 * {n_head} heads * D)")
    (B, C3), (least, most) = qkv.shape, D_RANGE
    D = C3 // (3 * n_head)
    if not least <= D <= most:
        raise ValueError(f"cached_attention: heads have {D} dimensions: {least} to {most} are possible")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape("cached_attention", name, cache, (B, n_head, k_cache.shape[-2], D))
        if not cache.is_contiguous():
            raise ValueError(f"cached_attention: {name} has strides {cache.stride()}: it must be contiguous")
    check_shape("cached_attention", "position", position, (B,))
    if position.dtype != torch.int64:
        raise TypeError(f"cached_attention: position is {position.dtype}: it must be int64")
    return cached_attention_(qkv, k_cache, v_cache, position, n_head)
