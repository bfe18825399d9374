"""Token + position embedding: the first value of the residual stream.

    o[b, t] = wte[idx[b, t]] + wpe[t]
    dwpe[t] = sum_b do[b, t],   dwte[v] = sum of do[b, t] over the positions where idx[b, t] = v

Shapes    idx (B, T) int64;  wte, dwte (V, C);  wpe, dwpe (block_size, C), whose rows from T on are unused;  o, do
          (B, T, C).
Traffic   forward writes o and reads one row of wte per token, mostly from L2; backward reads do for dwpe and again
          for dwte, and writes rows of dwte twice if their token occurs, else once. At B=64, T=1024, C=768 with a bf16
          stream: 2 x 101 MB read, 155 MB of zeros and 40 MB of sums written, against 101 MB read, 155 MB written and
          201 MB of atomic additions (Inductor), or a sort of the tokens and the same reads in fp32 (torch).
Saves     idx.
Buckets   Positions are grouped by token with integer atomics: count, running sum, scatter. The order of a token's
          positions in its bucket changes from run to run, so its rows are added in an arithmetic in which order does
          not matter: each column is scaled by a power of two that follows from its largest number, such that the sum of
          all positions fits into 62 bits, and integers are added. The same bits every time.
Long      A few tokens make up some per cent of a text each ("," and "the"); most tokens that occur have one or two
          positions. A program of one warp adds the latter, a program of eight warps the tokens with more than LONG
          positions. If all 65,536 tokens are the same, 12 programs add 65,536 rows of 64 columns each: the result is
          right, and most of the GPU is idle.
Numerics  o: added in fp32, rounded once. dwte: for N positions, 61 - log2 N bits below the column's largest number (45
          of them at N = 65,536, where fp32 has 24), rounded once; infinity and NaN as in torch: inf - inf is NaN. dwpe:
          summed in fp32, in one order.
Tokens    A token outside the vocabulary makes its row of o NaN, and so the loss; it has no gradient, and is never used
          as an address.
Source    Radford et al. 2019 (GPT-2); sums that do not depend on the order: Demmel & Nguyen 2013, ARITH 21.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2fast.kernels import launch
from gpt2fast.kernels.registration import DTYPES, check_device, check_shape, check_tensors, op

LONG = 64  # the most positions of a token that one warp adds, four at a time
INF = tl.constexpr(0x7F800000)  # as an integer; NaNs are above it
SIGNLESS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _embedding_fwd_kernel(wte_ptr, wpe_ptr, idx_ptr, o_ptr, M, T, V, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Compute o at M = B T positions."""
    column_blocks = tl.cdiv(C, BLOCK_N)
    offs_m = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < C
    mask = mask_m[:, None] & mask_n[None, :]
    token = tl.load(idx_ptr + offs_m, mask=mask_m, other=0)
    known = (token >= 0) & (token < V)
    wte = tl.load(wte_ptr + token[:, None] * C + offs_n[None, :], mask=mask & known[:, None], other=float("nan"))
    wpe = tl.load(wpe_ptr + (offs_m % T)[:, None] * C + offs_n[None, :], mask=mask, other=0.0)
    tl.store(o_ptr + offs_m[:, None] * C + offs_n[None, :], wte.to(tl.float32) + wpe.to(tl.float32), mask=mask)


@triton.jit
def _embedding_bwd_wpe_kernel(do_ptr, dwpe_ptr, B, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum do (B, n), n = T C, over B."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    dwpe = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, B, BLOCK_M):
        offs_b = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_b < B)[:, None] & mask_n[None, :]
        dwpe += tl.load(do_ptr + offs_b[:, None] * n + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dwpe_ptr + offs_n, tl.sum(dwpe, axis=0), mask=mask_n)


@triton.jit
def _append(list_ptr, length_ptr, token, chosen):
    rank = tl.cumsum(chosen.to(tl.int32), 0)
    slot = tl.atomic_add(length_ptr, tl.max(rank, axis=0), sem="relaxed") + rank - 1
    tl.store(list_ptr + slot, token.to(tl.int32), mask=chosen)


@triton.jit
def _embedding_bwd_count_kernel(
    idx_ptr, count_ptr, seen_ptr, long_ptr, lengths_ptr, N, V, LONG: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the positions of each token; list the tokens that occur, and those that occur more than LONG times."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(idx_ptr + offs, mask=offs < N, other=-1)
    known = (token >= 0) & (token < V)
    before = tl.atomic_add(count_ptr + token, 1, mask=known, sem="relaxed")
    _append(seen_ptr, lengths_ptr, token, known & (before == 0))  # 0 is read once per token: it is listed once
    _append(long_ptr, lengths_ptr + 1, token, known & (before == LONG))


@triton.jit
def _embedding_bwd_scatter_kernel(idx_ptr, start_ptr, position_ptr, N, V, BLOCK: tl.constexpr):
    """Fill each bucket from its end: start_ptr holds the ends first, and the starts when all is done."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(idx_ptr + offs, mask=offs < N, other=-1)
    known = (token >= 0) & (token < V)
    slot = tl.atomic_add(start_ptr + token, -1, mask=known, sem="relaxed") - 1
    tl.store(position_ptr + slot, offs.to(tl.int32), mask=known)


@triton.jit
def _load_rows(do_ptr, position_ptr, offs_m, n, offs_n, C):
    """Load the rows of do at entries offs_m of a bucket of n positions; zero beyond n."""
    mask_m = offs_m < n
    position = tl.load(position_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    mask = mask_m[:, None] & (offs_n < C)[None, :]
    return tl.load(do_ptr + position[:, None] * C + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _largest(x):
    """Return for each column the largest |x|, as the integer of its bits, which has the same order; and the sum of the
    infinite and NaN elements, which does not depend on their order, as the sum of all of x would."""
    bits = x.to(tl.int32, bitcast=True) & SIGNLESS
    return tl.max(bits, axis=0), tl.sum(tl.where(bits >= INF, x, 0.0), axis=0)


@triton.jit
def _sum_fixed(x, scale, rest):
    return tl.sum((x * scale[None, :] * rest[None, :]).to(tl.int64), axis=0)


@triton.jit
def _embedding_bwd_wte_kernel(
    do_ptr, dwte_ptr, list_ptr, length_ptr, count_ptr, start_ptr, position_ptr, C, BITS, MOST, PROGRAMS,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dwte for the listed tokens that have at most MOST positions. No sum has as many as 2^BITS terms."""
    column_blocks = tl.cdiv(C, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), tl.load(length_ptr) * column_blocks, PROGRAMS):
        token = tl.load(list_ptr + tile // column_blocks).to(tl.int64)
        offs_n = (tile % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        n = tl.load(count_ptr + token)
        if n <= MOST:
            bucket_ptr = position_ptr + tl.load(start_ptr + token)
            x = _load_rows(do_ptr, bucket_ptr, offs_m, n, offs_n, C)
            largest, not_finite = _largest(x)
            for start in range(BLOCK_M, n, BLOCK_M):
                y_largest, y_not_finite = _largest(_load_rows(do_ptr, bucket_ptr, start + offs_m, n, offs_n, C))
                largest, not_finite = tl.maximum(largest, y_largest), not_finite + y_not_finite
            shift = 62 + 126 - BITS - (largest >> 23)  # |x| < 2^(exponent - 126), also where x is denormal
            half = shift >> 1  # 2^shift as two factors: for a tiny x it would be infinite
            scale = ((half + 127) << 23).to(tl.float32, bitcast=True)
            rest = ((shift - half + 127) << 23).to(tl.float32, bitcast=True)
            total = _sum_fixed(x, scale, rest)
            for start in range(BLOCK_M, n, BLOCK_M):
                total += _sum_fixed(_load_rows(do_ptr, bucket_ptr, start + offs_m, n, offs_n, C), scale, rest)
            dwte = total.to(tl.float32)
            dwte *= ((127 - half) << 23).to(tl.float32, bitcast=True)
            dwte *= ((127 + half - shift) << 23).to(tl.float32, bitcast=True)
            dwte = tl.where(largest < INF, dwte, not_finite)
            tl.store(dwte_ptr + token * C + offs_n, dwte, mask=offs_n < C)


@op(
    "embedding_fwd",
    fake=lambda wte, wpe, idx, dtype: wte.new_empty((*idx.shape, wte.shape[1]), dtype=dtype),
)
def embedding_fwd(wte: Tensor, wpe: Tensor, idx: Tensor, dtype: torch.dtype) -> Tensor:
    (V, C), (B, T) = wte.shape, idx.shape
    o = wte.new_empty((B, T, C), dtype=dtype)
    if o.numel():
        rows = launch.elementwise_rows()
        grid = (triton.cdiv(B * T, rows.BLOCK_M) * triton.cdiv(C, rows.BLOCK_N),)
        _embedding_fwd_kernel[grid](
            wte_ptr=wte.contiguous(), wpe_ptr=wpe.contiguous(), idx_ptr=idx.contiguous(), o_ptr=o, M=B * T, T=T, V=V,
            C=C, **rows._asdict(),
        )  # fmt: skip
    return o


def _embedding_bwd_fake(do, idx, V, block_size, dtype):
    return do.new_empty((V, do.shape[-1]), dtype=dtype), do.new_empty((block_size, do.shape[-1]), dtype=dtype)


@op("embedding_bwd", fake=_embedding_bwd_fake)
def embedding_bwd(do: Tensor, idx: Tensor, V: int, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return dwte, dwpe."""
    B, T, C = do.shape
    dwte, dwpe = do.new_zeros((V, C), dtype=dtype), do.new_zeros((block_size, C), dtype=dtype)
    if do.numel():
        do, idx = do.contiguous(), idx.contiguous()
        rows = launch.embedding_batch(B)
        _embedding_bwd_wpe_kernel[(triton.cdiv(T * C, rows.BLOCK_N),)](
            do_ptr=do, dwpe_ptr=dwpe, B=B, n=T * C, **rows._asdict()
        )
        _sum_by_token(do, idx, dwte)
    return dwte, dwpe


def _sum_by_token(do: Tensor, idx: Tensor, dwte: Tensor) -> None:
    """Add the rows of do (B, T, C) to dwte (V, C), which must be zero."""
    N, (V, C), int32 = idx.numel(), dwte.shape, torch.int32
    counts, lengths = idx.new_zeros(V + 2, dtype=int32).split([V, 2])
    seen, most = idx.new_empty(min(N, V), dtype=int32), idx.new_empty(max(1, N // (LONG + 1)), dtype=int32)
    positions, BLOCK = idx.new_empty(N, dtype=int32), launch.elementwise()
    grid = (triton.cdiv(N, BLOCK),)
    _embedding_bwd_count_kernel[grid](
        idx_ptr=idx, count_ptr=counts, seen_ptr=seen, long_ptr=most, lengths_ptr=lengths, N=N, V=V, LONG=LONG,
        BLOCK=BLOCK,
    )  # fmt: skip
    starts = counts.cumsum(0, dtype=int32)
    _embedding_bwd_scatter_kernel[grid](idx_ptr=idx, start_ptr=starts, position_ptr=positions, N=N, V=V, BLOCK=BLOCK)
    for i, (tokens, limit) in enumerate(((seen, LONG), (most, N))):
        rows = launch.embedding_bucket(long=tokens is most)
        tiles = len(tokens) * triton.cdiv(C, rows.BLOCK_N)
        programs = launch.persistent(tiles, do.device, 32 // rows.num_warps)
        _embedding_bwd_wte_kernel[(programs,)](
            do_ptr=do, dwte_ptr=dwte, list_ptr=tokens, length_ptr=lengths[i:], count_ptr=counts, start_ptr=starts,
            position_ptr=positions, C=C, BITS=N.bit_length(), MOST=limit, PROGRAMS=programs, **rows._asdict(),
        )  # fmt: skip


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wte, wpe, idx, dtype):
        ctx.save_for_backward(idx)
        ctx.sizes = wte.shape[0], wpe.shape[0], wte.dtype
        return embedding_fwd(wte, wpe, idx, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *embedding_bwd(do, *ctx.saved_tensors, *ctx.sizes), None, None


def embedding(wte: Tensor, wpe: Tensor, idx: Tensor, dtype: torch.dtype) -> Tensor:
    """Return wte[idx] + wpe[:T]: wte (V, C), wpe (block_size, C), idx (B, T) int64 -> (B, T, C) in `dtype`.

    Autocast changes nothing. A token outside the vocabulary gives NaN. ValueError on shapes and devices; TypeError on
    dtypes and on idx.
    """
    check_tensors("embedding", same_dtype=True, wte=wte, wpe=wpe)
    check_device("embedding", "wte", wte, "idx", idx)
    if wte.dim() != 2:
        raise ValueError(f"embedding: wte has shape {tuple(wte.shape)}: it must have two dimensions, rows first")
    check_shape("embedding", "wpe", wpe, (wpe.shape[0], wte.shape[1]))
    if idx.dtype != torch.int64 or idx.dim() != 2:
        raise TypeError(f"embedding: idx is {idx.dtype} {tuple(idx.shape)}: it must be int64 of two dimensions")
    if idx.shape[1] > wpe.shape[0]:
        raise ValueError(f"embedding: idx has {idx.shape[1]} positions, and wpe {wpe.shape[0]}: shorten the sequences")
    if dtype not in DTYPES:
        raise TypeError(f"embedding: dtype is {dtype}: it must be float32, bfloat16 or float16")
    return _Embedding.apply(wte, wpe, idx, dtype)
