"""Cross-entropy with its gradient in place, alone and with the head's matmul before it.

    loss_i = m_i + log l_i - x_i[target_i],   m_i = max_v x_iv,   l_i = sum_v exp(x_iv - m_i)     x: logits (N, V)
    dx_iv  = (exp(x_iv - m_i - log l_i) - [v = target_i]) scale,      scale = gradient / number of targets
    linear_cross_entropy: x = h w^T,  dh = dx w,  dw = dx^T h           h (N, C), w (V, C)

Targets   A row whose target is -100 counts neither in the sum nor in the mean, and its gradient is 0. A target outside
          the vocabulary makes the loss NaN; it is never used as an address. Columns from `vocab_size` on are padding:
          their logits count as minus infinity, their gradient is 0.
Traffic   Logits are read from memory once and the gradient is written over them once. The maximum and the sum come
          first, so each row is read again, from L2: launch.cross_entropy_block keeps the rows in flight below its size.
Chunks    linear_cross_entropy computes the logits of launch.head_rows rows at a time, their gradient in place, and from
          it dh and the sum of dw: nothing is recomputed in backward, and 1 / chunks of the logits exists. A chunk may
          take a sixteenth of the device's memory, at least 1 GiB: B=64, T=1024 is one chunk with 140 GB, which is
          fastest, and seven with little memory. The gradient is kept without its scale, which backward applies to dh
          and dw: in fp16 (p - 1) / N would be 0, and loss scaling comes too late to help. dw is summed in fp32.
Numerics  fp32 inside. The maximum is subtracted before anything is rounded, so large logits cost no digits. Offsets
          have 64 bits: N V exceeds 2^31 at B=64, T=1024.
Source    Milakov & Gimelshein 2018, arXiv:1805.02867 (one pass for maximum and sum); Wijmans et al. 2024,
          arXiv:2411.09009 (the loss without the logits).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2fast.kernels import launch
from gpt2fast.kernels.registration import check_device, check_shape, check_tensors, compute_dtype, op

IGNORE = -100  # torch's
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _cross_entropy_kernel(
    x_ptr, target_ptr, dx_ptr, loss_ptr, scale_ptr, V, stride_xm, stride_dxm, vocab_size, ignore_index,
    WRITE_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute the loss of a row, and dx, which may overwrite x. scale_ptr: one fp32 number that dx is multiplied by."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    dx_ptr += row * stride_dxm
    target = tl.load(target_ptr + row)
    counts = target != ignore_index
    # loaded before the reductions, whose barriers keep a fast warp from writing its gradient over it
    valid = (target >= 0) & (target < vocab_size)
    x_target = tl.load(x_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
    m = float("-inf")
    l = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        # two masks, since one bounded by the odd 50257 would make every load scalar
        x = tl.load(x_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        x = tl.where(offs_v < vocab_size, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        # x - base, not x log2 e - base log2 e: the difference is exact where it matters
        l = l * tl.exp2((m - base) * LOG2_E) + tl.exp2((x - base) * LOG2_E)
        m = m_new
    log2_l = tl.log2(tl.sum(l, axis=0))
    tl.store(loss_ptr + row, tl.where(counts, m - x_target + log2_l * LN_2, 0.0))
    if WRITE_GRAD:
        scale = tl.where(counts, tl.load(scale_ptr), 0.0)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            x = tl.load(x_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
            p = tl.exp2((x - m) * LOG2_E - log2_l)
            dx = (p - tl.where(offs_v == target, 1.0, 0.0)) * scale
            dx = tl.where(counts & (offs_v < vocab_size), dx, 0.0)  # also where an ignored logit is NaN
            tl.store(dx_ptr + offs_v, dx, mask=offs_v < V)


@triton.jit
def _scale_kernel(x_ptr, o_ptr, factor_ptr, n, PROGRAMS, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute o = x factor. In place, nothing is read or written if factor is 1, and the host need not know."""
    factor = tl.load(factor_ptr)
    if (factor != 1.0) | (not IN_PLACE):
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, PROGRAMS * BLOCK):
            offs = start + tl.arange(0, BLOCK).to(tl.int64)
            x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
            tl.store(o_ptr + offs, x * factor, mask=offs < n)


def _rows(x: Tensor, targets: Tensor, dx: Tensor | None, losses: Tensor, scale: Tensor, vocab_size: int, ignore: int):
    """Fill losses (N,) and, if it is given, dx, which may be x."""
    N, V = x.shape
    if not N:
        return
    BLOCK_V, num_warps = launch.cross_entropy_block(V)
    out = x if dx is None else dx
    _cross_entropy_kernel[(N,)](
        x_ptr=x, target_ptr=targets, dx_ptr=out, loss_ptr=losses, scale_ptr=scale, V=V, stride_xm=x.stride(0),
        stride_dxm=out.stride(0), vocab_size=vocab_size, ignore_index=ignore, WRITE_GRAD=dx is not None,
        BLOCK_V=BLOCK_V, num_warps=num_warps,
    )  # fmt: skip


def _scalar(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _count(targets: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Return the number of targets that count, fp32, and the share of each in the gradient: 1 / count. If no target
    counts, the mean is NaN and the gradient 0, as in torch."""
    count = (targets != ignore).sum().to(torch.float32)
    return count, count.clamp(min=1).reciprocal()


def _loss(x: Tensor, targets: Tensor, dx: Tensor | None, vocab_size: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Return the mean loss, and the factor by which dx is still to be multiplied."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    count, share = _count(targets, ignore)
    # in fp16 (p - 1) / N would be 0, so the share is applied later
    first = torch.ones_like(share) if x.dtype == torch.float16 else share
    _rows(x, targets, dx, losses, first, vocab_size, ignore)
    return losses.sum() / count, share / first


@op("cross_entropy_fwd", fake=lambda x, *_: _scalar(x))
def cross_entropy_fwd(x: Tensor, targets: Tensor, vocab_size: int, ignore: int) -> Tensor:
    """Return the mean loss alone."""
    return _loss(x if x.stride(-1) == 1 else x.contiguous(), targets.contiguous(), None, vocab_size, ignore)[0]


@op("cross_entropy_fwd_grad", fake=lambda x, *_: (_scalar(x), x.new_empty(x.shape), _scalar(x)))
def cross_entropy_fwd_grad(x: Tensor, targets: Tensor, vocab_size: int, ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss, dlogits in a new tensor, and the factor by which dlogits is still to be multiplied."""
    dx = x.new_empty(x.shape)
    x = x if x.stride(-1) == 1 else x.contiguous()
    loss, rest = _loss(x, targets.contiguous(), dx, vocab_size, ignore)
    return loss, dx, rest


@op("cross_entropy_fwd_grad_", fake=lambda x, *_: (_scalar(x), _scalar(x)), mutates=("x",))
def cross_entropy_fwd_grad_(x: Tensor, targets: Tensor, vocab_size: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Write dlogits over x; return the mean loss, and the factor by which dlogits is still to be multiplied."""
    return _loss(x, targets.contiguous(), x, vocab_size, ignore)


@op("scale_", fake=lambda x, factor: None, mutates=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply the dense x by factor, an fp32 number on the device; free if it is 1."""
    _scale(x, x, factor)


@op("scaled", fake=lambda x, factor, dtype: x.new_empty(x.shape, dtype=dtype))
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x factor, rounded once to `dtype`: torch's product of bf16 and an fp32 number rounds the number first."""
    o = x.new_empty(x.shape, dtype=dtype)
    _scale(x.contiguous(), o, factor)
    return o


def _scale(x: Tensor, o: Tensor, factor: Tensor) -> None:
    if n := x.numel():
        BLOCK = launch.elementwise()
        programs = launch.persistent(triton.cdiv(n, BLOCK), x.device, 16)
        _scale_kernel[(programs,)](
            x_ptr=x, o_ptr=o, factor_ptr=factor, n=n, PROGRAMS=programs, IN_PLACE=o is x, BLOCK=BLOCK
        )


def _linear_cross_entropy_fake(h, w, targets, dtype, vocab_size, rows, need_dh, need_dw):
    dh = h.new_empty(h.shape if need_dh else (0, h.shape[1]), dtype=dtype)
    dw = w.new_empty(w.shape if need_dw else (0, w.shape[1]), dtype=torch.float32)
    return _scalar(h), dh, dw, _scalar(h)


@op("linear_cross_entropy_fwd", fake=_linear_cross_entropy_fake)
def linear_cross_entropy_fwd(
    h: Tensor, w: Tensor, targets: Tensor, dtype: torch.dtype, vocab_size: int, rows: int, need_dh: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean loss; dh and dw (fp32) without their scale, empty unless needed; 1 / number of targets. The
    matmuls run in `dtype`, on `rows` rows of h at a time."""
    _, dh, dw, _ = _linear_cross_entropy_fake(h, w, targets, dtype, vocab_size, rows, need_dh, need_dw)
    h, w, targets = h.to(dtype), w.to(dtype), targets.contiguous()
    N, V = h.shape[0], w.shape[0]
    losses = h.new_empty(N, dtype=torch.float32)
    one = torch.ones_like(_scalar(h))
    buffer = h.new_empty((min(rows, N), V))
    for start in range(0, N, rows):
        here = slice(start, start + rows)
        x = torch.mm(h[here], w.t(), out=buffer[: len(h[here])])  # (rows, V): logits
        _rows(x, targets[here], x if need_dh or need_dw else None, losses[here], one, vocab_size, IGNORE)
        if need_dh:
            torch.mm(x, w, out=dh[here])
        if need_dw:
            _add_product(dw, x.t(), h[here], first=start == 0)
    if need_dw and not N:
        dw.zero_()
    count, share = _count(targets, IGNORE)
    return losses.sum() / count, dh, dw, share


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a b to the fp32 total; the `first` product overwrites it."""
    if a.dtype == torch.float16:  # a sum over thousands of rows may exceed 65504
        product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
    else:
        product = torch.mm(a, b)
    if first:
        total.copy_(product)
    else:
        total.add_(product)


class _CrossEntropy(torch.autograd.Function):
    """The loss of logits that need a gradient, which is computed at once."""

    @staticmethod
    def forward(ctx, x, targets, vocab_size, ignore, inplace):
        if inplace:
            loss, rest = cross_entropy_fwd_grad_(x, targets, vocab_size, ignore)
            torch.autograd.graph.increment_version(x)  # a graph that saved the logits then raises
            dx = x
        else:
            loss, dx, rest = cross_entropy_fwd_grad(x, targets, vocab_size, ignore)
        ctx.save_for_backward(dx.detach(), rest)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, rest = ctx.saved_tensors
        scale_(dx, rest * dloss)
        torch.autograd.graph.increment_version(dx)  # so that a second backward raises, and does not scale twice
        return dx, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, dtype, vocab_size, rows, need_dh, need_dw):
        loss, dh, dw, share = linear_cross_entropy_fwd(h, w, targets, dtype, vocab_size, rows, need_dh, need_dw)
        ctx.save_for_backward(dh, dw, share)
        ctx.needed, ctx.dtypes = (need_dh, need_dw), (h.dtype, w.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dh, dw, share = ctx.saved_tensors
        scale = dloss * share
        # new tensors, not in place: with retain_graph, backward can run twice
        gradients = [scaled(g, scale, t) if needed else None for g, t, needed in zip((dh, dw), ctx.dtypes, ctx.needed)]
        return *gradients, *(None,) * 6


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE, vocab_size: int | None = None, inplace: bool = True
) -> Tensor:
    """Return the mean cross-entropy in fp32: logits (N, V) in fp32, bf16 or fp16, targets (N,) int64.

    If a gradient is needed, it is computed at once and overwrites the logits; inplace=False keeps them, at the cost of
    their size. Else (torch.no_grad, or logits that need no gradient) they are only read. A leaf is the caller's data
    and never overwritten. Columns from `vocab_size` on are padding. The loss is NaN if no target counts, as in torch,
    and if a target is neither in the vocabulary nor `ignore_index`.
    """
    vocab_size = _check("cross_entropy", "logits", logits, targets, vocab_size, logits.shape[-1])
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return cross_entropy_fwd(logits, targets, vocab_size, ignore_index)
    # torch.compile itself decides whose memory a result may take
    dense = logits.is_contiguous() and not logits.is_leaf and not torch.compiler.is_compiling()
    return _CrossEntropy.apply(logits, targets, vocab_size, ignore_index, inplace and dense)


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int | None = None) -> Tensor:
    """Return cross_entropy(x w^T, targets), fp32, a chunk of logits at a time: x (N, C), w (V, C), targets (N,) int64.

    The matmuls run in autocast's dtype, or in that of x, which w must then have. Gradients that are needed are computed
    in the forward pass; backward only scales them.
    """
    vocab_size = _check("linear_cross_entropy", "x", x, targets, vocab_size, w.shape[0])
    check_tensors("linear_cross_entropy", not torch.is_autocast_enabled(x.device.type), x=x, w=w)
    check_shape("linear_cross_entropy", "w", w, (w.shape[0], x.shape[1]))
    dtype = compute_dtype(x)
    rows = launch.head_rows(x.shape[0], w.shape[0], dtype.itemsize, launch.head_budget(x.device))
    grad = torch.is_grad_enabled()
    need_dh, need_dw = grad and x.requires_grad, grad and w.requires_grad
    return _LinearCrossEntropy.apply(x, w, targets, dtype, vocab_size, rows, need_dh, need_dw)


def _check(op: str, name: str, x: Tensor, targets: Tensor, vocab_size: int | None, V: int) -> int:
    check_tensors(op, **{name: x})
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}: it must have two dimensions, rows first")
    check_device(op, name, x, "targets", targets)
    check_shape(op, "targets", targets, x.shape[:1])
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets are {targets.dtype}: they must be int64")
    vocab_size = V if vocab_size is None else vocab_size
    if not 0 < vocab_size <= V:
        raise ValueError(f"{op}: vocab_size is {vocab_size}: it must be between 1 and the {V} columns there are")
    return vocab_size
