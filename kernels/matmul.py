"""The parts of a matrix product, for kernels that process its tiles before they are written.

A persistent program takes every PROGRAMS-th tile of a grid, in the order that `tile_origin` sets. Operands and results
are dense row-major matrices, read and written in tiles. With TMA an operand is a tensor descriptor: one thread asks the
copy engine for a tile, which comes with zeros outside the matrix. Else it is a pointer, and tiles are masked.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP_M = tl.constexpr(8)
TMA_BYTES = 16  # addresses and rows must be multiples of this


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the tile's first row and column. GROUP_M rows of tiles advance along the columns together: the tiles in
    flight form nearly a square, so that their operands are read from L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return (first + tile % group % rows) * BLOCK_M, tile % group // rows * BLOCK_N


@triton.jit
def load_tile(x_ptr, row, col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr):
    """Load x[row : row + BLOCK_R, col : col + BLOCK_C] of x (rows, cols), zero outside."""
    if TMA:
        return x_ptr.load([row, col])
    else:  # code after the return would be compiled for descriptors too
        offs_r = row + tl.arange(0, BLOCK_R)
        offs_c = col + tl.arange(0, BLOCK_C)
        ptrs = x_ptr + offs_r.to(tl.int64)[:, None] * cols + offs_c[None, :]
        return tl.load(ptrs, mask=(offs_r < rows)[:, None] & (offs_c < cols)[None, :], other=0.0)


@triton.jit
def store_tile(x_ptr, x, row, col, rows, cols):
    """Store the tile x at [row :, col :] of a matrix (rows, cols)."""
    offs_r = row + tl.arange(0, x.shape[0])
    offs_c = col + tl.arange(0, x.shape[1])
    ptrs = x_ptr + offs_r.to(tl.int64)[:, None] * cols + offs_c[None, :]
    tl.store(ptrs, x, mask=(offs_r < rows)[:, None] & (offs_c < cols)[None, :])


@triton.jit
def product_tile(
    a_ptr, b_ptr, row, col, M, N, K, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return a tile (BLOCK_M, BLOCK_N), fp32, of a b^T, b (N, K), if TRANSPOSED, else of a b, b (K, N); a (M, K)."""
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
    """Split a tile's columns into 1, 2 or 4 equal parts, left to right."""
    if PIECES == 1:
        return (acc,)
    else:
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
        return columns(left, PIECES // 2) + columns(right, PIECES // 2)


def tma_can_reach(*tensors: Tensor) -> bool:
    """Return whether no tensor is empty, and all addresses and rows are multiples of 16 bytes. All must be dense."""
    return all(
        x.numel() and x.data_ptr() % TMA_BYTES == 0 and x.shape[-1] * x.itemsize % TMA_BYTES == 0 for x in tensors
    )


def matrix(x: Tensor, tma: bool, *block: int) -> Tensor | TensorDescriptor:
    """Return what a kernel takes for the dense x (..., cols): x, or a descriptor of blocks of it as (rows, cols)."""
    cols = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // cols, cols], [cols, 1], list(block)) if tma else x
