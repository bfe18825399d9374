"""Pieces of a matrix product, for kernels that do something to its tiles before they are written.

A persistent program takes every PROGRAMS-th tile of a grid whose order `tile_origin` sets. Operands and results are
dense row-major matrices, read and written in tiles; with TMA each is a tensor descriptor, and one thread asks the
copy engine for a tile, which comes with zeros outside; without, it is a pointer, and tiles are masked.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP_M = tl.constexpr(8)
TMA_BYTES = 16  # it wants addresses and rows that are multiples of this


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column. GROUP_M rows of tiles go along the columns together: what a device works on at one time
    is nearly square, and its operands are read from L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return (first + tile % group % rows) * BLOCK_M, tile % group // rows * BLOCK_N


@triton.jit
def load_tile(x_ptr, row, col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr):
    """x[row : row + BLOCK_R, col : col + BLOCK_C] of x (rows, cols), zero outside."""
    if TMA:
        return x_ptr.load([row, col])
    else:  # not after the return: what is after it is compiled for descriptors too
        offs_r = row + tl.arange(0, BLOCK_R)
        offs_c = col + tl.arange(0, BLOCK_C)
        ptrs = x_ptr + offs_r.to(tl.int64)[:, None] * cols + offs_c[None, :]
        return tl.load(ptrs, mask=(offs_r < rows)[:, None] & (offs_c < cols)[None, :], other=0.0)


@triton.jit
def store_tile(x_ptr, x, row, col, rows, cols):
    """x[row :, col :] = the tile x."""
    offs_r = row + tl.arange(0, x.shape[0])
    offs_c = col + tl.arange(0, x.shape[1])
    ptrs = x_ptr + offs_r.to(tl.int64)[:, None] * cols + offs_c[None, :]
    tl.store(ptrs, x, mask=(offs_r < rows)[:, None] & (offs_c < cols)[None, :])


@triton.jit
def product_tile(
    a_ptr, b_ptr, row, col, M, N, K, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile (BLOCK_M, BLOCK_N), fp32, of a b^T for b (N, K) if TRANSPOSED, else of a b for b (K, N); a (M, K)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = load_tile(a_ptr, row, k, M, K, BLOCK_M, BLOCK_K, TMA)
        if TRANSPOSED:
            b = load_tile(b_ptr, col, k, N, K, BLOCK_N, BLOCK_K, TMA).T
        else:
            b = load_tile(b_ptr, k, col, K, N, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def columns(acc, PIECES: tl.constexpr):
    """A tile's columns in 1, 2 or 4 equal parts, left to right."""
    if PIECES == 1:
        return (acc,)
    else:
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
        return columns(left, PIECES // 2) + columns(right, PIECES // 2)


def tma_can_reach(*tensors: Tensor) -> bool:
    """Dense matrices whose addresses and rows are multiples of 16 bytes, and that are not empty."""
    return all(
        x.numel() and x.data_ptr() % TMA_BYTES == 0 and x.shape[-1] * x.itemsize % TMA_BYTES == 0 for x in tensors
    )


def matrix(x: Tensor, tma: bool, *block: int) -> Tensor | TensorDescriptor:
    """What a kernel is given for x (..., cols), dense: itself, or a descriptor of blocks of it as (rows, cols)."""
    cols = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // cols, cols], [cols, 1], list(block)) if tma else x
