"""Attention of one new token a row, whose earlier keys and values lie in a cache. For writing text: no backward.

    k_cache[p], v_cache[p] = k, v        p: the row's position
    o = sum_j w_j v_j / sum_j w_j,       w_j = exp(q k_j / sqrt(D)),  j = 0 .. p

Shapes    qkv (B, 3C), o (B, C): heads of D = C / n_head side by side;  k_cache, v_cache (B, H, S, D);  position (B,)
          int64. D from 16 to 256, padded inside to a power of two. Rows stand at different positions: a program reads
          its own row's keys and no others, so that what lies behind them in the cache does not matter.
Traffic   4 B C (p + 1) bytes of a half type: keys and values once, 3 MB a layer of GPT-2 124M at B=1, p=1023, where the
          layer's weights are 14 MB. Two operations a byte, so no tensor cores.
Programs  One for each row and head, with no split of the keys. At B=8, 96 programs are as many as most GPUs have
          processors. At B=1 there are 12: with 64 kB in flight at 0.7 us of latency one reads 94 GB/s, 3 us for 1024
          keys (estimated, not measured), where a layer's weights take 3 us at 4.3 TB/s. A split needs a second kernel
          that adds up the parts, 1 to 2 us in each layer at any length: it would gain at the end of a long text that
          is written alone.
Softmax   Each of BLOCK_N lanes is an online softmax of its own over keys lane, lane + BLOCK_N, ...: nothing crosses
          threads in the loop but q k. Lanes and the new token, which is not read back, are added up once, at the end,
          in one order: the same bits every time, whatever the other rows are.
Numerics  All in fp32 and base 2, rounded once. A position outside the cache is never an address: its row is NaN.
Source    Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels import launch
from gpt2fast.kernels.attention_forward import D_RANGE, LOG2_E
from gpt2fast.kernels.registration import autocast, check_device, check_shape, check_tensors, op

LEAST = tl.constexpr(-3e38)  # of a lane that has seen nothing: minus infinity would give inf - inf


@triton.jit
def _cached_attention_kernel(
    qkv_ptr, k_cache_ptr, v_cache_ptr, position_ptr, o_ptr, H, S, D, qk_scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # of all rows
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

    m = tl.full((BLOCK_N,), LEAST, dtype=tl.float32)  # of each lane: largest score, sum of weights, of weights times v
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
    """o (B, C)."""
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
    """One new token a row, (B, 3C) at `position` (B,) int64 -> (B, C). Its key and value are written to the caches
    (B, H, S, D), which are contiguous and of the compute dtype.

    Under autocast in its dtype. ValueError on shapes, D outside 16 to 256 and devices; TypeError on dtypes;
    RuntimeError where a gradient is asked for.
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
