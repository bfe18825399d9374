"""tanh-GELU, alone and fused with the bias before it.

    gelu(x) = x/2 (1 + tanh u) = x sigmoid(z),    u = sqrt(2/pi) (x + 0.044715 x^3),  z = 2u
    dx = do (s + x s t dz/dx),    s = sigmoid(z),  t = sigmoid(-z),  dz/dx = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
    bias_gelu(x, b) = gelu(x + b),    db = sum_m dx

Shapes    gelu: x, o of any shape. bias_gelu: x, o (..., N); b (N,).
Traffic   forward 2 elements (read x, write o), backward 3 (read do, x; write dx); the bias and db add nothing, where an
          unfused bias gradient reads dx once more.
Saves     x. Neither o nor the tanh: both are a few instructions from x.
Numerics  fp32 inside, rounded once. 0.5 (1 + tanh u) equals sigmoid(2u) exactly, and as a sigmoid it neither cancels
          in the left tail nor needs a library call; t is computed as a sigmoid, since 1 - s cancels. db is summed in
          fp32, in an order that depends only on M, N and the device: the same bits every time.
Source    Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2fast.kernels import launch
from gpt2fast.kernels.registration import autocast, check_shape, check_tensors, op

TWO_SQRT_2_OVER_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)
THREE_CUBIC = tl.constexpr(3 * 0.044715)


@triton.jit
def gelu_z(x):
    return x * TWO_SQRT_2_OVER_PI * (1 + x * x * CUBIC)


@triton.jit
def _gelu(x):
    return x * tl.sigmoid(gelu_z(x))


@triton.jit
def _gelu_grad(x):
    s = tl.sigmoid(gelu_z(x))
    return s + x * s * tl.sigmoid(-gelu_z(x)) * (1 + x * x * THREE_CUBIC) * TWO_SQRT_2_OVER_PI


@triton.jit
def _gelu_fwd_kernel(x_ptr, o_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(o_ptr + offs, _gelu(x), mask=offs < n)


@triton.jit
def _gelu_bwd_kernel(do_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    do = tl.load(do_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs, do * _gelu_grad(x), mask=offs < n)


@triton.jit
def _bias_gelu_fwd_kernel(x_ptr, b_ptr, o_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    column_blocks = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = offs_m[:, None] * N + offs_n[None, :]  # (BLOCK_M, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + b[None, :]
    tl.store(o_ptr + offs, _gelu(x), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    do_ptr, x_ptr, b_ptr, dx_ptr, db_ptr, M, N, PARTS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A persistent program (part, column block) takes every PARTS-th tile of its columns; db_ptr is (PARTS, N) fp32."""
    column_blocks = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // column_blocks
    offs_n = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(part, tl.cdiv(M, BLOCK_M), PARTS):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs = offs_m[:, None] * N + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        do = tl.load(do_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + b[None, :]
        dx = do * _gelu_grad(x)
        tl.store(dx_ptr + offs, dx, mask=mask)
        db += dx
    tl.store(db_ptr + part.to(tl.int64) * N + offs_n, tl.sum(db, axis=0), mask=offs_n < N)


@op("gelu_fwd", fake=lambda x: x.new_empty(x.shape))
def gelu_fwd(x: Tensor) -> Tensor:
    x = x.contiguous()
    o = x.new_empty(x.shape)
    if n := x.numel():
        BLOCK = launch.elementwise()
        _gelu_fwd_kernel[(triton.cdiv(n, BLOCK),)](x_ptr=x, o_ptr=o, n=n, BLOCK=BLOCK)
    return o


@op("gelu_bwd", fake=lambda do, x: x.new_empty(x.shape))
def gelu_bwd(do: Tensor, x: Tensor) -> Tensor:
    do, x = do.contiguous(), x.contiguous()
    dx = x.new_empty(x.shape)
    if n := x.numel():
        BLOCK = launch.elementwise()
        _gelu_bwd_kernel[(triton.cdiv(n, BLOCK),)](do_ptr=do, x_ptr=x, dx_ptr=dx, n=n, BLOCK=BLOCK)
    return dx


@op("bias_gelu_fwd", fake=lambda x, b: x.new_empty(x.shape))
def bias_gelu_fwd(x: Tensor, b: Tensor) -> Tensor:
    x, b = x.contiguous(), b.contiguous()
    o = x.new_empty(x.shape)
    if x.numel():
        M, N = x.numel() // len(b), len(b)
        rows = launch.elementwise_rows()
        grid = (triton.cdiv(M, rows.BLOCK_M) * triton.cdiv(N, rows.BLOCK_N),)
        _bias_gelu_fwd_kernel[grid](x_ptr=x, b_ptr=b, o_ptr=o, M=M, N=N, **rows._asdict())
    return o


@op("bias_gelu_bwd", fake=lambda do, x, b: (x.new_empty(x.shape), b.new_empty(b.shape)))
def bias_gelu_bwd(do: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    do, x, b = do.contiguous(), x.contiguous(), b.contiguous()
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros_like(b)
    M, N = x.numel() // len(b), len(b)
    rows = launch.elementwise_rows()
    column_blocks, tiles = triton.cdiv(N, rows.BLOCK_N), triton.cdiv(M, rows.BLOCK_M)
    parts = min(tiles, triton.cdiv(launch.persistent(tiles * column_blocks, x.device, 8), column_blocks))
    db = x.new_empty((parts, N), dtype=torch.float32)
    _bias_gelu_bwd_kernel[(parts * column_blocks,)](
        do_ptr=do, x_ptr=x, b_ptr=b, dx_ptr=dx, db_ptr=db, M=M, N=N, PARTS=parts, **rows._asdict()
    )
    return dx, db.sum(0).to(b.dtype)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return gelu_fwd(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return gelu_bwd(do, *ctx.saved_tensors)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b):
        ctx.save_for_backward(x, b)
        return bias_gelu_fwd(x, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return bias_gelu_bwd(do, *ctx.saved_tensors)


def gelu(x: Tensor) -> Tensor:
    """Apply tanh-GELU to x (any shape; fp32, bf16 or fp16), under autocast in its dtype. TypeError on other dtypes."""
    check_tensors("gelu", x=x)
    return _Gelu.apply(*autocast(x))


def bias_gelu(x: Tensor, b: Tensor) -> Tensor:
    """Return gelu(x + b): x (..., N), b (N,) of one dtype; under autocast both are cast to its dtype.

    ValueError on shapes and devices; TypeError on dtypes.
    """
    x, b = autocast(x, b)
    check_tensors("bias_gelu", same_dtype=True, x=x, b=b)
    check_shape("bias_gelu", "b", b, x.shape[-1:])
    return _BiasGelu.apply(x, b)
