"""LayerNorm, alone and fused with the residual add before it.

    s = x + y                                   (add_layer_norm only)
    z = (s - mean) rstd,   o = z w + b,         rstd = 1 / sqrt(var + eps)
    ds = rstd (g - mean(g) - z mean(g z)) [+ the gradient that s has from elsewhere],  g = do w
    dw = sum_m do z,  db = sum_m do

Shapes    x, y, s, o: (M, N);  w, b: (N,);  mean, rstd: (M,) fp32.  Any N up to 16384.
Traffic   forward 4 MN elements (read x, y; write s, o) against 5 MN unfused; backward 4 MN (read do, s, the residual's
          gradient; write dx, which is also dy) against 6 MN; dw and db come from the same reads.
Saves     s, mean, rstd. Not z: one multiply-add recovers it.
Numerics  loads and reductions in fp32; the mean is subtracted before squares are summed, and its own rounding error
          after that, so that neither a large offset nor a row of equal numbers costs digits; statistics stay fp32
          (bf16 statistics cost up to 1e-2 in dw). s is rounded to its dtype before it is normalised, so forward and
          backward see the same numbers.
Order     Backward is a persistent grid: each program sums dw and db of its rows in registers and writes one row of an
          fp32 buffer of (programs, N), which is added up at the end. No atomics: the same bits every time. The next
          rows are prefetched (cp.async) while these are summed; else memory would idle half of the time.
Source    Ba et al. 2016, arXiv:1607.06450.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2fast.kernels import launch
from gpt2fast.kernels.registration import check_shape, check_tensors, compute_dtype, op

MAX_N = 16384  # a row is held in registers


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, y_ptr, w_ptr, b_ptr, s_ptr, o_ptr, mean_ptr, rstd_ptr, M, N, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs = offs_m[:, None] * N + offs_n[None, :]  # (BLOCK_M, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        s = x.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offs, s, mask=mask)
        x = s.to(tl.float32)
    mean = tl.sum(x, axis=1) / N
    x = tl.where(mask, x - mean[:, None], 0.0)
    rest = tl.sum(x, axis=1) / N  # the mean's rounding error: rstd may magnify it 316 times (eps = 1e-5)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / N - rest * rest + eps)
    x -= rest[:, None]
    w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(o_ptr + offs, x * rstd[:, None] * w[None, :] + b[None, :], mask=mask)
    tl.store(mean_ptr + offs_m, mean + rest, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def _layer_norm_bwd_kernel(
    ds_ptr, do_ptr, s_ptr, w_ptr, dx_ptr, dy_ptr, dw_ptr, db_ptr, mean_ptr, rstd_ptr, M, N, PROGRAMS,
    HAS_RESIDUAL: tl.constexpr, WRITE_DY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dw_ptr and db_ptr are (PROGRAMS, N) fp32. dy is dx in the other dtype, if x and y have two."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), PROGRAMS, num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs = offs_m[:, None] * N + offs_n[None, :]
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        do = tl.load(do_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # 0 outside, so all sums below are right
        z = tl.load(s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        z = (z - mean[:, None]) * rstd[:, None]
        dw += do * z
        db += do
        g = do * w[None, :]
        mean_g = tl.sum(g, axis=1) / N
        mean_gz = tl.sum(g * z, axis=1) / N
        dx = (g - mean_g[:, None] - z * mean_gz[:, None]) * rstd[:, None]
        if HAS_RESIDUAL:
            dx += tl.load(ds_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx, mask=mask)
        if WRITE_DY:
            tl.store(dy_ptr + offs, dx, mask=mask)
    part = tl.program_id(0).to(tl.int64) * N
    tl.store(dw_ptr + part + offs_n, tl.sum(dw, axis=0), mask=mask_n)
    tl.store(db_ptr + part + offs_n, tl.sum(db, axis=0), mask=mask_n)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _forward(x: Tensor, y: Tensor | None, w: Tensor, b: Tensor, s: Tensor | None, eps: float, dtype: torch.dtype):
    """Return o, mean and rstd of contiguous x, or of x + y, which is then written to s."""
    o, (mean, rstd) = x.new_empty(x.shape, dtype=dtype), _statistics(x)
    if x.numel():
        M, N = x.numel() // x.shape[-1], x.shape[-1]
        rows = launch.layer_norm_rows(N, backward=False)
        _layer_norm_fwd_kernel[(triton.cdiv(M, rows.BLOCK_M),)](
            x_ptr=x, y_ptr=y, w_ptr=w.contiguous(), b_ptr=b.contiguous(), s_ptr=s, o_ptr=o, mean_ptr=mean,
            rstd_ptr=rstd, M=M, N=N, eps=eps, HAS_RESIDUAL=y is not None, **rows._asdict(),
        )  # fmt: skip
    return o, mean, rstd


def _backward(ds: Tensor | None, do: Tensor, s: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor | None):
    """Return dx in the dtype of s, dw and db in that of w; fill dy if it is given."""
    ds = ds if ds is None else ds.contiguous()
    do, s, w = do.contiguous(), s.contiguous(), w.contiguous()
    dx = s.new_empty(s.shape)
    if not s.numel():
        return dx, torch.zeros_like(w), torch.zeros_like(w)
    M, N = s.numel() // s.shape[-1], s.shape[-1]
    rows = launch.layer_norm_rows(N, backward=True)
    programs = launch.persistent(triton.cdiv(M, rows.BLOCK_M), s.device)
    dw, db = s.new_empty((2, programs, N), dtype=torch.float32)
    _layer_norm_bwd_kernel[(programs,)](
        ds_ptr=ds, do_ptr=do, s_ptr=s, w_ptr=w, dx_ptr=dx, dy_ptr=dy, dw_ptr=dw, db_ptr=db, mean_ptr=mean,
        rstd_ptr=rstd, M=M, N=N, PROGRAMS=programs, HAS_RESIDUAL=ds is not None, WRITE_DY=dy is not None,
        NUM_STAGES=launch.LAYER_NORM_STAGES, **rows._asdict(),
    )  # fmt: skip
    return dx, dw.sum(0).to(w.dtype), db.sum(0).to(w.dtype)


@op("layer_norm_fwd", fake=lambda x, w, b, eps, dtype: (x.new_empty(x.shape, dtype=dtype), *_statistics(x)))
def layer_norm_fwd(x: Tensor, w: Tensor, b: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, mean, rstd."""
    return _forward(x.contiguous(), None, w, b, None, eps, dtype)


@op("layer_norm_bwd", fake=lambda do, x, w, mean, rstd: (x.new_empty(x.shape), *(w.new_empty(w.shape) for _ in "wb")))
def layer_norm_bwd(do: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dw, db."""
    return _backward(None, do, x, w, mean, rstd, None)


def _add_layer_norm_fwd_fake(x, y, w, b, eps, dtype):
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return s, x.new_empty(x.shape, dtype=dtype), *_statistics(x)


@op("add_layer_norm_fwd", fake=_add_layer_norm_fwd_fake)
def add_layer_norm_fwd(
    x: Tensor, y: Tensor, w: Tensor, b: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return s, o, mean, rstd."""
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return s, *_forward(x.contiguous(), y.contiguous(), w, b, s, eps, dtype)


def _add_layer_norm_bwd_fake(ds, do, s, w, mean, rstd, other):
    dy = s.new_empty(0 if other == s.dtype else s.shape, dtype=other)
    return s.new_empty(s.shape), dy, w.new_empty(w.shape), w.new_empty(w.shape)


@op("add_layer_norm_bwd", fake=_add_layer_norm_bwd_fake)
def add_layer_norm_bwd(
    ds: Tensor | None, do: Tensor, s: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, other: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx in the dtype of s, dx in the dtype `other` (empty if that is the same), dw, db."""
    dy = s.new_empty(0 if other == s.dtype else s.shape, dtype=other)
    dx, dw, db = _backward(ds, do, s, w, mean, rstd, dy if dy.numel() else None)
    return dx, dy, dw, db


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, eps, dtype):
        o, mean, rstd = layer_norm_fwd(x, w, b, eps, dtype)
        ctx.save_for_backward(x, w, mean, rstd)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *layer_norm_bwd(do, *ctx.saved_tensors), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, w, b, eps, dtype):
        s, o, mean, rstd = add_layer_norm_fwd(x, y, w, b, eps, dtype)
        ctx.save_for_backward(s, w, mean, rstd)
        ctx.dtypes = x.dtype, y.dtype
        ctx.set_materialize_grads(False)  # the last block's s has no gradient: no zeros are made and read for it
        return s, o

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, do):
        x_dtype, y_dtype = ctx.dtypes
        if do is None:  # only the sum was used
            return None if ds is None else ds.to(x_dtype), None if ds is None else ds.to(y_dtype), *(None,) * 4
        s, w, mean, rstd = ctx.saved_tensors
        other = y_dtype if x_dtype == s.dtype else x_dtype
        dx, dy, dw, db = add_layer_norm_bwd(ds, do, s, w, mean, rstd, other)
        in_dtype = {other: dy, s.dtype: dx}
        return in_dtype[x_dtype], in_dtype[y_dtype], dw, db, None, None


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """Apply LayerNorm over the last dimension: x (..., N); w, b (N,) of x's dtype or fp32 -> (..., N).

    Under autocast the result has its dtype, else that of x. ValueError on shapes and devices, TypeError on dtypes.
    """
    _check("layer_norm", x, w, b)
    return _LayerNorm.apply(x, w, b, eps, compute_dtype(x))


def add_layer_norm(x: Tensor, y: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return x + y and layer_norm(x + y): x, y (..., N). The sum has the wider dtype; else as layer_norm."""
    _check("add_layer_norm", x, w, b)
    check_tensors("add_layer_norm", x=x, y=y)
    check_shape("add_layer_norm", "y", y, x.shape)
    if x.dtype != y.dtype and torch.float32 not in (x.dtype, y.dtype):
        raise TypeError(f"add_layer_norm: x is {x.dtype} and y is {y.dtype}: convert one of them")
    return _AddLayerNorm.apply(x, y, w, b, eps, compute_dtype(x, torch.promote_types(x.dtype, y.dtype)))


def _check(name: str, x: Tensor, w: Tensor, b: Tensor) -> None:
    check_tensors(name, x=x, w=w, b=b)
    check_shape(name, "w", w, x.shape[-1:])
    check_shape(name, "b", b, x.shape[-1:])
    if w.dtype != b.dtype or w.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name}: w is {w.dtype} and b is {b.dtype}: both must be {x.dtype} as x, or float32")
    if x.shape[-1] > MAX_N:
        raise ValueError(f"{name}: the last dimension is {x.shape[-1]}: at most {MAX_N} columns fit into registers")
