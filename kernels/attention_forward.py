"""Flash attention: softmax(scale q k^T + mask) v, forward and backward, without ever holding a T x T matrix.

    s = scale q k^T,   m = running max of s,   l = running sum of exp(s - m),   acc = running sum of exp(s - m) v
    o = acc / l,       lse = m + log l         when m grows to m', l and acc are first multiplied by exp(m - m')
    p = exp(s - lse),  delta = sum_d(do o),    dp = do v^T,  ds = p (dp - delta)
    dv = p^T do,       dk = scale ds^T q,      dq = scale ds k

Shapes    q, o: (B, H, T_q, D);  k, v: (B, H, T_k, D);  lse, delta: (B, H, T_q) fp32.  D from 16 to 256, padded to a
          power of two in the kernels. Packed: qkv (B, T, 3C), o (B, T, C), heads side by side: nothing is transposed or
          copied.
Causal    The diagonal ends at the last query and the last key: query i sees key j if j <= i + T_k - T_q, which is what
          decoding with a cache needs. A query that sees no key gets zeros. Tiles in which no query sees a key are not
          visited; full tiles and masked tiles have separate loops.
Traffic   forward reads q, k, v and writes o, lse; backward reads q, k, v, o, do, lse and writes dq, dk, dv. The keys
          and values of a head are read once per query tile, from L2.
Saves     q, k, v, o, lse. p is recomputed from lse: once, in attention_backward.py, if there are enough heads to give
          each processor its own, and dq of the heads in flight fits in L2; else twice, in two kernels: one owns queries
          and writes dq (and delta, for the other one), one owns keys and writes dk and dv, with seven matmuls instead
          of five. No atomics either way: the same bits every time.
Numerics  Dots accumulate in fp32; p and ds are rounded to the inputs' dtype for the second dot, as in FlashAttention.
          Everything is in base 2 (exp2 is one instruction): scale is multiplied by log2 e once, lse is a base-2
          logarithm. fp32 dots are exact unless the user has allowed TF32 in torch.
Source    Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4; Dao 2023, arXiv:2307.08691, section 3.
"""

import math

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2fast.kernels import launch
from gpt2fast.kernels.attention_backward import _attention_bwd_kernel
from gpt2fast.kernels.attention_tiles import (
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
    _attention_fwd_kernel,
)
from gpt2fast.kernels.registration import autocast, check_shape, check_tensors, dot_precision, op

LOG2_E = math.log2(math.e)
D_RANGE = 16, 256


def _rows_contiguous(x: Tensor) -> Tensor:
    """Copy x unless its last stride is 1; the others may be any. Views of a packed projection are never copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return stride_qb, stride_qh, stride_qt for q (B, H, T, D), and so on."""
    return {f"stride_{name}{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bht")}


def _shared_arguments(q: Tensor, k: Tensor, scale: float, causal: bool) -> dict:
    """The arguments of every kernel: sizes, scale, flags."""
    _, H, T_q, D = q.shape
    return {
        "H": H, "T_q": T_q, "T_k": k.shape[2], "D": D, "qk_scale": scale * LOG2_E, "CAUSAL": causal,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "PRECISION": dot_precision(),
    }  # fmt: skip


def _forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float) -> None:
    """Fill o, whose last stride is 1, and lse."""
    B, H, T_q, D = q.shape
    if not o.numel():
        return
    if not k.numel():
        o.zero_(), lse.fill_(-math.inf)
        return
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    tiles = launch.attention_forward(D, q.dtype, launch.capability(q.device))
    _attention_fwd_kernel[(triton.cdiv(T_q, tiles.BLOCK_M) * B * H,)](
        q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=o, lse_ptr=lse, **_strides(q=q, k=k, v=v, o=o),
        **_shared_arguments(q, k, scale, causal), **tiles._asdict(),
    )  # fmt: skip


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    causal: bool, scale: float,
) -> None:  # fmt: skip
    """Fill dq, dk and dv, whose last stride is 1."""
    B, H, T_q, D = q.shape
    T_k = k.shape[2]
    if not q.numel() or not k.numel():
        dq.zero_(), dk.zero_(), dv.zero_()
        return
    do, q, k, v = _rows_contiguous(do), _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    delta = torch.empty_like(lse)
    shared = _shared_arguments(q, k, scale, causal) | {"scale": scale}
    strides = _strides(q=q, k=k, v=v, do=do)
    if launch.attention_one_pass(B * H, T_q, D, q.dtype, q.device):
        tiles = launch.attention_backward(D, q.dtype, launch.capability(q.device))
        programs = launch.persistent(B * H, q.device, per_processor=1)
        sums = lse.new_empty(programs, triton.cdiv(T_q, tiles.BLOCK_M), shared["BLOCK_D"], tiles.BLOCK_M)
        _attention_bwd_kernel[(programs,)](
            q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=o, do_ptr=do, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, lse_ptr=lse,
            delta_ptr=delta, sum_ptr=sums, **strides, **_strides(o=o, dq=dq, dk=dk, dv=dv), HEADS=B * H,
            **shared, **tiles._asdict(),
        )  # fmt: skip
        return
    tiles = launch.attention_dq(D, q.dtype, launch.capability(q.device))
    _attention_bwd_dq_kernel[(triton.cdiv(T_q, tiles.BLOCK_M) * B * H,)](
        q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=o, do_ptr=do, dq_ptr=dq, lse_ptr=lse, delta_ptr=delta,
        **strides, **_strides(o=o, dq=dq), **shared, **tiles._asdict(),
    )  # fmt: skip
    tiles = launch.attention_dkdv(D, q.dtype, launch.capability(q.device))
    _attention_bwd_dkdv_kernel[(triton.cdiv(T_k, tiles.BLOCK_N) * B * H,)](
        q_ptr=q, k_ptr=k, v_ptr=v, do_ptr=do, dk_ptr=dk, dv_ptr=dv, lse_ptr=lse, delta_ptr=delta,
        **strides, **_strides(dk=dk, dv=dv), **shared, **tiles._asdict(),
    )  # fmt: skip


def _lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


@op("flash_attention_fwd", fake=lambda q, k, v, causal, scale: (q.new_empty(q.shape), _lse(q)))
def flash_attention_fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return o, lse."""
    o, lse = q.new_empty(q.shape), _lse(q)
    _forward(q, k, v, o, lse, causal, scale)
    return o, lse


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


@op("flash_attention_bwd", fake=lambda do, q, k, v, *_: _like(q, k, v))
def flash_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    dq, dk, dv = _like(q, k, v)
    _backward(do, q, k, v, o, lse, dq, dk, dv, causal, scale)
    return dq, dk, dv


def _unpack(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v, each a view (B, H, T, D) of qkv (B, T, 3C)."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _heads(o: Tensor, n_head: int) -> Tensor:
    """Return o (B, T, C) as a view (B, H, T, D)."""
    B, T, C = o.shape
    return o.view(B, T, n_head, C // n_head).transpose(1, 2)


def _packed_outputs(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    B, T, C3 = qkv.shape
    return qkv.new_empty((B, T, C3 // 3)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


@op("attention_fwd", fake=lambda qkv, n_head, scale: _packed_outputs(qkv, n_head))
def attention_fwd(qkv: Tensor, n_head: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return o (B, T, C), lse (B, H, T)."""
    o, lse = _packed_outputs(qkv, n_head)
    _forward(*_unpack(qkv.contiguous(), n_head), _heads(o, n_head), lse, True, scale)
    return o, lse


@op("attention_bwd", fake=lambda do, qkv, o, lse, n_head, scale: qkv.new_empty(qkv.shape))
def attention_bwd(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, n_head: int, scale: float) -> Tensor:
    """Return dqkv (B, T, 3C), into which dq, dk and dv are written without a copy."""
    dqkv = qkv.new_empty(qkv.shape)
    do, o = (_heads(x.contiguous(), n_head) for x in (do, o))
    _backward(do, *_unpack(qkv.contiguous(), n_head), o, lse, *_unpack(dqkv, n_head), True, scale)
    return dqkv


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        o, lse = flash_attention_fwd(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal, ctx.scale = causal, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *flash_attention_bwd(do, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, scale):
        o, lse = attention_fwd(qkv, n_head, scale)
        ctx.save_for_backward(qkv, o, lse)
        ctx.n_head, ctx.scale = n_head, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return attention_bwd(do, *ctx.saved_tensors, ctx.n_head, ctx.scale), None, None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """Return softmax(scale q k^T) v: q (B, H, T_q, D); k, v (B, H, T_k, D); one dtype, any strides -> (B, H, T_q, D).

    `scale` must be positive; the default is 1 / sqrt(D). Under autocast all three are cast to its dtype. ValueError on
    shapes, D outside 16 to 256, scale and devices; TypeError on dtypes.
    """
    q, k, v = autocast(q, k, v)
    check_tensors("flash_attention", same_dtype=True, q=q, k=k, v=v)
    if q.dim() != 4:
        raise ValueError(f"flash_attention: q has shape {tuple(q.shape)}: it must be (B, H, T, D)")
    check_shape("flash_attention", "k", k, (*q.shape[:2], k.shape[-2], q.shape[3]))
    check_shape("flash_attention", "v", v, k.shape)
    _check_head("flash_attention", q.shape[3])
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"flash_attention: scale is {scale}: it must be positive and finite (negate q instead)")
    return _FlashAttention.apply(q, k, v, causal, scale)


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """Apply causal attention to packed projections: (B, T, 3C) -> (B, T, C), heads of D = C / n_head side by side.

    The scale is 1 / sqrt(D). Under autocast qkv is cast to its dtype. ValueError on shapes and D outside 16 to 256;
    TypeError on dtypes.
    """
    (qkv,) = autocast(qkv)
    check_tensors("attention", qkv=qkv)
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}: it must be (B, T, 3 * {n_head} heads * D)")
    D = qkv.shape[2] // (3 * n_head)
    _check_head("attention", D)
    return _Attention.apply(qkv, n_head, D**-0.5)


def _check_head(op: str, D: int) -> None:
    least, most = D_RANGE
    if not least <= D <= most:
        raise ValueError(f"{op}: heads have {D} dimensions: {least} to {most} are possible; use the torch backend")
