"""The MLP with GELU and its derivative in the epilogues of the matmuls next to them: the alternative to projections.py.

    h = x fc_w^T + fc_b,   a = gelu(h),   y = a proj_w^T + proj_b
    dh = (dy proj_w) gelu'(h),   dfc_b = sum_m dh,   dproj_b = sum_m dy
    dx = dh fc_w,   dfc_w = dh^T x,   dproj_w = dy^T a

Shapes    x (..., C), fc_w (F, C), fc_b (F,), proj_w (C, F), proj_b (C,), y (..., C); h, a, dh (M, F), M rows, F = 4 C.
Kernels   One computes h and a from x; one computes dh, a once more, and the sums of dh from dy and h. All other matmuls
          are torch's: they have no epilogue. Persistent, with two programs on a processor: the tensor cores work for
          one while the other loads, stores and takes exponentials: in backward at C=768 on an H200, loads and stores of
          a tile of 128 x 128 take about 0.7 of the time of its product, its exponentials 0.3 (estimated). Operands come
          through TMA from sm_90 on, where they are aligned to it, else through pointers.
Traffic   In passes over H = M F elements, per layer: forward writes h, a and reads a; backward reads h, writes dh, a
          and reads a, dh, dh: 9. projections.py takes 11: forward also reads h; backward writes and reads da, and need
          not write a. At M=65536, C=768 in bf16 two passes are 0.81 GB per layer.
Saves     x and h. Not a, another M F elements, 4.8 GB in the 12 layers of that example, which projections.py keeps.
Numerics  fp32 accumulators. h is rounded once, with its bias, and a is the GELU of the rounded h, the same bits in
          both directions. The product dy proj_w is not rounded before it is multiplied by gelu'. dfc_b is the sum of
          the unrounded dh: over a tile's rows in its epilogue, over the tiles at the end (M / 128 rows of fp32), in an
          order that depends only on shapes and settings: no atomics, the same bits every time.
Speed     Not measured. Estimated for an H200: this is faster than projections.py while its two matmuls, without their
          epilogues, are less than 20% slower than cuBLAS's (9% at C=1600); or, timed alone with them, up to 39% slower
          in forward, where they replace a pass over 2 H, and up to 59% in backward, where they replace one over 3 H.
Source    Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2 (GELU); NVIDIA's CUTLASS, "Efficient GEMM in CUDA".
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2fast.kernels import launch
from gpt2fast.kernels.matmul import (
    columns,
    load_tile,
    matrix,
    product_tile,
    store_tile,
    tile_origin,
    tma_can_reach,
)
from gpt2fast.kernels.registration import autocast, check_shape, check_tensors, dot_precision, op
from gpt2fast.kernels.tanh_gelu import THREE_CUBIC, TWO_SQRT_2_OVER_PI, gelu_z


@triton.jit
def _gelu_and_grad(x):
    """Return GELU and its derivative as in tanh_gelu.py, with one exponential and reciprocal for both sigmoids."""
    z = gelu_z(x)
    e = tl.exp(-tl.abs(z))
    large = 1 / (1 + e)
    small = e * large
    s = tl.where(z >= 0, large, small)
    t = tl.where(z >= 0, small, large)
    return x * s, s + x * s * t * (1 + x * x * THREE_CUBIC) * TWO_SQRT_2_OVER_PI


@triton.jit
def _fwd_piece(acc, b_ptr, h_ptr, a_ptr, row, col, M, N):
    """Compute h and a of a tile whose product is acc."""
    offs_n = col + tl.arange(0, acc.shape[1])
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0)
    h = (acc + b.to(tl.float32)[None, :]).to(b.dtype)
    a, _ = _gelu_and_grad(h.to(tl.float32))  # of the rounded h, as backward recomputes it
    store_tile(h_ptr, h, row, col, M, N)
    store_tile(a_ptr, a, row, col, M, N)


@triton.jit
def _bwd_piece(da, h_ptr, dh_ptr, a_ptr, db_ptr, row, col, M, N):
    """Compute dh, a and the sum of dh of a tile whose product is da."""
    h = load_tile(h_ptr, row, col, M, N, da.shape[0], da.shape[1], False).to(tl.float32)
    a, grad = _gelu_and_grad(h)
    dh = da * grad
    store_tile(a_ptr, a, row, col, M, N)
    store_tile(dh_ptr, dh, row, col, M, N)
    offs_n = col + tl.arange(0, da.shape[1])
    tl.store(db_ptr + offs_n, tl.sum(dh, axis=0), mask=offs_n < N)  # rows beyond M are zero


@triton.jit
def _linear_gelu_fwd_kernel(
    x_ptr, w_ptr, b_ptr, h_ptr, a_ptr, M, N, K, PROGRAMS, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Compute h and a (M, N) from x (M, K) and w (N, K)."""
    tl.assume(K > 0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_N // PIECES
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=TMA):
        row, col = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        acc = product_tile(x_ptr, w_ptr, row, col, M, N, K, True, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
        pieces = columns(acc, PIECES)
        for i in tl.static_range(PIECES):
            _fwd_piece(pieces[i], b_ptr, h_ptr, a_ptr, row, col + i * PIECE, M, N)


@triton.jit
def _linear_gelu_bwd_kernel(
    dy_ptr, w_ptr, h_ptr, dh_ptr, a_ptr, db_ptr, M, N, K, PROGRAMS, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Compute dh, a (M, N) and db (row tiles, N) fp32 from dy (M, K), w (K, N) and h (M, N)."""
    tl.assume(K > 0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_N // PIECES
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=TMA):
        row, col = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        da = product_tile(dy_ptr, w_ptr, row, col, M, N, K, False, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
        pieces = columns(da, PIECES)
        part_ptr = db_ptr + (row // BLOCK_M).to(tl.int64) * N
        for i in tl.static_range(PIECES):
            _bwd_piece(pieces[i], h_ptr, dh_ptr, a_ptr, part_ptr, row, col + i * PIECE, M, N)


def _tiles(a: Tensor, b: Tensor) -> tuple[bool, launch.MatmulTiles]:
    """Return whether both operands come through TMA, and the tiles."""
    capability = launch.capability(a.device)
    aligned = tma_can_reach(a, b)
    return aligned and launch.matmul_tma(a.dtype, capability), launch.matmul_tiles(a.dtype, capability, aligned)


def _shared_arguments(h: Tensor, K: int, tma: bool, tiles: launch.MatmulTiles) -> dict:
    """The arguments of both kernels: sizes, programs, settings."""
    N = h.shape[-1]
    M = h.numel() // N
    grid = triton.cdiv(M, tiles.BLOCK_M) * triton.cdiv(N, tiles.BLOCK_N)
    programs = launch.persistent(grid, h.device, launch.MATMUL_PROGRAMS)
    return {
        "M": M, "N": N, "K": K, "PROGRAMS": programs, "PRECISION": dot_precision(), "TMA": tma, **tiles._asdict(),
    }  # fmt: skip


def _like_h(x: Tensor, F: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], F))


@op("linear_gelu_fwd", fake=lambda x, w, b: (_like_h(x, w.shape[0]), _like_h(x, w.shape[0])))
def linear_gelu_fwd(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return h = x w^T + b and gelu(h), each (..., N): x (..., K), w (N, K), b (N,)."""
    x, w, b = x.contiguous(), w.contiguous(), b.contiguous()
    h, a = _like_h(x, len(w)), _like_h(x, len(w))
    if h.numel():
        tma, t = _tiles(x, w)
        shared = _shared_arguments(h, x.shape[-1], tma, t)
        _linear_gelu_fwd_kernel[(shared["PROGRAMS"],)](
            x_ptr=matrix(x, tma, t.BLOCK_M, t.BLOCK_K), w_ptr=matrix(w, tma, t.BLOCK_N, t.BLOCK_K), b_ptr=b, h_ptr=h,
            a_ptr=a, **shared,
        )  # fmt: skip
    return h, a


@op(
    "linear_gelu_bwd",
    fake=lambda dy, w, h: (h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape[-1:])),
)
def linear_gelu_bwd(dy: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh = (dy w) gelu'(h), gelu(h), and dh summed over all rows, (N,): dy (..., K), w (K, N), h (..., N)."""
    dy, w, h = dy.contiguous(), w.contiguous(), h.contiguous()
    dh, a = h.new_empty(h.shape), h.new_empty(h.shape)
    if not h.numel():
        return dh, a, h.new_zeros(h.shape[-1:])
    tma, t = _tiles(dy, w)
    shared = _shared_arguments(h, dy.shape[-1], tma, t)
    db = h.new_empty((triton.cdiv(shared["M"], t.BLOCK_M), shared["N"]), dtype=torch.float32)
    _linear_gelu_bwd_kernel[(shared["PROGRAMS"],)](
        dy_ptr=matrix(dy, tma, t.BLOCK_M, t.BLOCK_K), w_ptr=matrix(w, tma, t.BLOCK_K, t.BLOCK_N), h_ptr=h, dh_ptr=dh,
        a_ptr=a, db_ptr=db, **shared,
    )  # fmt: skip
    return dh, a, db.sum(0).to(h.dtype)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc_w, fc_b, proj_w, proj_b):
        h, a = linear_gelu_fwd(x, fc_w, fc_b)
        ctx.save_for_backward(x, h, fc_w, proj_w)
        return F.linear(a, proj_w, proj_b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, fc_w, proj_w = ctx.saved_tensors
        dh, a, dfc_b = linear_gelu_bwd(dy, proj_w, h)
        x, dh_rows, a, dy = (t.reshape(-1, t.shape[-1]) for t in (x, dh, a, dy))
        need_x, need_fc_w, _, need_proj_w, need_proj_b = ctx.needs_input_grad
        return (
            dh @ fc_w if need_x else None,
            dh_rows.t() @ x if need_fc_w else None,
            dfc_b,
            dy.t() @ a if need_proj_w else None,
            dy.sum(0) if need_proj_b else None,
        )


def mlp(x: Tensor, fc_w: Tensor, fc_b: Tensor, proj_w: Tensor, proj_b: Tensor) -> Tensor:
    """Return gelu(x fc_w^T + fc_b) proj_w^T + proj_b: (..., C), (F, C), (F,), (C, F), (C,) -> (..., C).

    All are of one dtype; under autocast they are cast to its dtype. ValueError on shapes and devices; TypeError on
    dtypes.
    """
    x, fc_w, fc_b, proj_w, proj_b = autocast(x, fc_w, fc_b, proj_w, proj_b)
    check_tensors("mlp", same_dtype=True, x=x, fc_w=fc_w, fc_b=fc_b, proj_w=proj_w, proj_b=proj_b)
    width = len(fc_b)
    check_shape("mlp", "fc_w", fc_w, (width, x.shape[-1]))
    check_shape("mlp", "fc_b", fc_b, (width,))
    check_shape("mlp", "proj_w", proj_w, (len(proj_b), width))
    check_shape("mlp", "proj_b", proj_b, (len(proj_b),))
    if not fc_w.numel() or not proj_w.numel():
        raise ValueError(f"mlp: fc_w is {tuple(fc_w.shape)}, proj_w {tuple(proj_w.shape)}: both must have elements")
    return _MLP.apply(x, fc_w, fc_b, proj_w, proj_b)
