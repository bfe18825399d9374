"""The references of attention: softmax(q k^T) v in float64, and FlashAttention's arithmetic at a dtype."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch

from gpt2fast import reference
from gpt2fast.kernels import attention, flash_attention
from tests.tools.accuracy import Results, assert_kernel_is_as_accurate, outputs_and_gradients
from tests.tools.inputs import DTYPES, normal

pytestmark = pytest.mark.kernel


class Shape(NamedTuple):
    B: int
    H: int
    T_q: int
    T_k: int
    D: int


# Tiles have 64 to 128 positions, those of sm_90, also in the interpreter
SHAPES = {
    "GPT-2's, two tiles": Shape(1, 2, 256, 256, 64),
    "prime": Shape(1, 1, 131, 131, 64),
    "a tile and a bit": Shape(1, 1, 129, 129, 64),
    "decoding": Shape(2, 2, 1, 150, 64),
    "more keys than queries": Shape(1, 1, 70, 200, 32),
    "more queries than keys": Shape(1, 1, 200, 70, 32),  # causal: the first 130 queries see no key
    "least D": Shape(1, 1, 40, 40, 16),
    "D not a power of two": Shape(1, 2, 70, 70, 80),
    "odd D": Shape(1, 1, 33, 33, 19),
    "D 128": Shape(1, 1, 70, 70, 128),
    "largest D": Shape(1, 1, 40, 40, 256),
    "no sequences": Shape(0, 2, 8, 8, 16),
    "no queries": Shape(1, 1, 0, 8, 16),
    "no keys": Shape(1, 1, 8, 0, 16),
}


def mask(q, k, causal):
    """Return which keys each query sees: the diagonal ends at the last query and the last key."""
    T_q, T_k = q.shape[-2], k.shape[-2]
    visible = torch.ones(T_q, T_k, dtype=torch.bool, device=q.device)
    return visible.tril(T_k - T_q) if causal else visible


def truth(q, k, v, causal=True, scale=None):
    """Return softmax(scale q k^T) v, and zeros where no key is visible."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = mask(q, k, causal)
    s = (q @ k.mT * scale).masked_fill(~visible, torch.finfo(q.dtype).min)
    return (torch.softmax(s, -1) * visible) @ v


def honest(inputs, cotangents, causal=True, scale=None):
    """Follow FlashAttention's arithmetic in fp32 (arXiv:2205.14135): scores are added up one product after the other,
    in base 2 with the scale folded in, as its exp2 needs them; backward recomputes them, in another order, and p from
    lse; p, ds and o are rounded to the dtype."""
    dtype = inputs[0].dtype

    def rounded(x):
        return x.to(dtype).float()

    q, k, v, do = (x.float() for x in (*inputs, *cotangents))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = mask(q, k, causal)

    def scores(q, k):
        s = torch.zeros(*q.shape[:-1], k.shape[-2], device=q.device)
        for d in range(q.shape[-1]):
            s += q[..., :, None, d] * k[..., None, :, d]
        return (s * (scale * math.log2(math.e))).masked_fill(~visible, -math.inf)

    s = scores(q, k)
    m = s.amax(-1, keepdim=True).clamp(min=-1e30) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    p = torch.exp2(s - m)
    l = p.sum(-1, keepdim=True).clamp(min=1e-30)
    o = rounded(rounded(p) @ v / l)
    p = torch.exp2(scores(q.flip(-1), k.flip(-1)) - (m + torch.log2(l)))
    ds = rounded(p * (do @ v.mT - (o * do).sum(-1, keepdim=True)))
    gradients = [scale * (ds @ k), scale * (ds.mT @ q), rounded(p).mT @ do]
    return Results([o.to(dtype)], [g.to(dtype) for g in gradients], list(cotangents))


def check(q, k, v, causal=True, scale=None, **options):
    flags = {"causal": causal, "scale": scale}
    kernel, judge, base = (partial(fn, **flags) for fn in (flash_attention, truth, honest))
    assert_kernel_is_as_accurate(kernel, judge, [q, k, v], base=base, gradient_factor=3.0, **options)


def qkv(shape, dtype, device, values="normal"):
    B, H, T_q, T_k, D = shape
    make = partial(normal, dtype=dtype, device=device, values=values)
    return make(B, H, T_q, D, seed=1), make(B, H, T_k, D, seed=2), make(B, H, T_k, D, seed=3)


# ---- tests of both backwards


def huge_logits(dtype, device):
    # nearly all rows are one-hot: errors come from the few rows in which two keys tie
    q, k, v = qkv(Shape(1, 1, 70, 70, 64), DTYPES[dtype], device)
    check(q * 100, k * 16, v, few=math.inf)
    assert (q.float() @ k.float().mT * 100 * 16 / 8).max() > 5e3


def values_that_are_all_equal(T_q, T_k, dtype, device):
    """o is that value, and the gradient of the scores is zero except for rounding errors of the size of do v."""
    q, k, v = qkv(Shape(1, 2, T_q, T_k, 32), DTYPES[dtype], device)
    v = v[:, :, :1].expand_as(v)
    got = outputs_and_gradients(partial(flash_attention, causal=False), [q, k, v])
    eps = torch.finfo(q.dtype).eps
    torch.testing.assert_close(got.outputs[0], v[:, :, :1].expand_as(q), rtol=8 * eps, atol=0)
    for dx in got.gradients[:2]:
        assert dx.abs().max() < 40 * eps


def any_strides(device):
    """(B, T, H, D) projections, every other position, every other feature, and an expanded gradient."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(Shape(2, 2, 40, 40, 32), torch.half, device))
    check(q, k[..., ::1], v)
    wide = qkv(Shape(2, 2, 80, 80, 64), torch.half, device)
    check(*(x[:, :, ::2, ::2] for x in wide))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(flash_attention(*leaves).sum(), leaves)
    want = torch.autograd.grad(
        flash_attention(*leaves), leaves, torch.ones_like(q, memory_format=torch.contiguous_format)
    )
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def packed_is_flash_attention(B, T, n_head, D, dtype, device):
    """The bits are those of flash_attention on the parts, whose accuracy is tested above; the gradient is packed."""
    packed = normal(B, T, 3 * n_head * D, dtype=DTYPES[dtype], device=device)
    got = outputs_and_gradients(partial(attention, n_head=n_head), [packed])

    def apart(packed):
        q, k, v = packed.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4)
        return flash_attention(q, k, v).transpose(1, 2).reshape(B, T, n_head * D)

    want = outputs_and_gradients(apart, [packed])
    assert torch.equal(got.outputs[0], want.outputs[0])
    assert torch.equal(got.gradients[0], want.gradients[0])
    truth = reference.attention(packed.double(), n_head) if B else packed.double()[..., : n_head * D]
    assert (got.outputs[0].double() - truth).abs().max().item() < 0.02 if B else True
    assert got.gradients[0].is_contiguous()


def fully_masked_tiles_are_not_visited(device):
    """A NaN in one would give 0 * NaN: keys of the second tile for queries of the first, and the reverse."""
    q, k, v = qkv(Shape(1, 1, 256, 256, 64), torch.float16, device)
    do = normal(1, 1, 256, 64, dtype=torch.float16, device=device, seed=4)
    late, early = slice(128, 256), slice(0, 128)
    k[:, :, late], v[:, :, late] = float("nan"), float("nan")
    got = outputs_and_gradients(flash_attention, [q, k, v], [do])
    assert got.outputs[0][:, :, early].isfinite().all()
    assert got.gradients[0][:, :, early].isfinite().all()
    q, k, v = qkv(Shape(1, 1, 256, 256, 64), torch.float16, device)
    q[:, :, early], do[:, :, early] = float("nan"), float("nan")
    got = outputs_and_gradients(flash_attention, [q, k, v], [do])
    assert got.gradients[1][:, :, late].isfinite().all()
    assert got.gradients[2][:, :, late].isfinite().all()
