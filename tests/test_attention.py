"""Flash attention against softmax(q k^T) v, forward and backward, packed and not."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from accuracy import Results, assert_kernel_is_as_accurate, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, normal

from gpt2fast import reference
from gpt2fast.kernels import attention, flash_attention

pytestmark = pytest.mark.kernel


class Shape(NamedTuple):
    B: int
    H: int
    T_q: int
    T_k: int
    D: int


# Tiles are 64 to 128 positions, of sm_90, which the interpreter walks too
SHAPES = {
    "GPT-2's, two tiles": Shape(1, 2, 256, 256, 64),
    "prime": Shape(1, 1, 131, 131, 64),
    "a tile and a bit": Shape(1, 1, 129, 129, 64),
    "decoding": Shape(2, 2, 1, 150, 64),
    "more keys than queries": Shape(1, 1, 70, 200, 32),
    "more queries than keys": Shape(1, 1, 200, 70, 32),  # causal: the first 130 queries see nothing
    "least D": Shape(1, 1, 40, 40, 16),
    "D no power of two": Shape(1, 2, 70, 70, 80),
    "odd D": Shape(1, 1, 33, 33, 19),
    "D 128": Shape(1, 1, 70, 70, 128),
    "largest D": Shape(1, 1, 40, 40, 256),
    "no sequences": Shape(0, 2, 8, 8, 16),
    "no queries": Shape(1, 1, 0, 8, 16),
    "no keys": Shape(1, 1, 8, 0, 16),
}


def mask(q, k, causal):
    """Which key each query sees: the diagonal ends at the last of both."""
    T_q, T_k = q.shape[-2], k.shape[-2]
    visible = torch.ones(T_q, T_k, dtype=torch.bool, device=q.device)
    return visible.tril(T_k - T_q) if causal else visible


def truth(q, k, v, causal=True, scale=None):
    """softmax(scale q k^T) v, and zeros where nothing is visible."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = mask(q, k, causal)
    s = (q @ k.mT * scale).masked_fill(~visible, torch.finfo(q.dtype).min)
    return (torch.softmax(s, -1) * visible) @ v


def honest(inputs, cotangents, causal=True, scale=None):
    """FlashAttention's arithmetic in fp32 (arXiv:2205.14135): scores added up one product after the other, in base 2
    with the scale folded in, as its exp2 wants them; backward makes them again, in another order, and p from lse; p, ds
    and o are rounded to the dtype."""
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention(shape, causal, dtype, device):
    check(*qkv(SHAPES[shape], DTYPES[dtype], device), causal)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.integers(2, 150), st.integers(16, 70),
    st.booleans(), st.sampled_from(["bf16", "fp16"]),
)  # fmt: skip
def test_any_shape(device, B, H, T_q, T_k, D, causal, dtype):
    # from two keys on: the scores of a single one have no gradient, see test_values_that_are_all_equal
    check(*qkv(Shape(B, H, T_q, T_k, D), DTYPES[dtype], device), causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["offset", "tiny", "one-hot"])
def test_other_values(values, dtype, device):
    """Of v; what they do to q and k is the next test's."""
    shape = Shape(1, 1, 70, 70, 64)
    check(*qkv(shape, DTYPES[dtype], device)[:2], qkv(shape, DTYPES[dtype], device, values)[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(dtype, device):
    # nearly all rows are one-hot: the errors are those of the few where two keys draw
    q, k, v = qkv(Shape(1, 1, 70, 70, 64), DTYPES[dtype], device)
    check(q * 100, k * 16, v, few=math.inf)
    assert (q.float() @ k.float().mT * 100 * 16 / 8).max() > 5e3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T_q", "T_k"), [(1, 1), (5, 1), (40, 40)])
def test_values_that_are_all_equal(T_q, T_k, dtype, device):
    """o is that value, and the scores have no gradient: what is left of it is rounding, of the size of do v."""
    q, k, v = qkv(Shape(1, 2, T_q, T_k, 32), DTYPES[dtype], device)
    v = v[:, :, :1].expand_as(v)
    got = outputs_and_gradients(partial(flash_attention, causal=False), [q, k, v])
    eps = torch.finfo(q.dtype).eps
    torch.testing.assert_close(got.outputs[0], v[:, :, :1].expand_as(q), rtol=8 * eps, atol=0)
    for dx in got.gradients[:2]:
        assert dx.abs().max() < 40 * eps


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_scale(scale, device):
    check(*qkv(Shape(1, 1, 40, 40, 32), torch.float16, device), scale=scale)


def test_any_strides(device):
    """Of (B, T, H, D) projections, of every other position, of every other feature, and of an expanded gradient."""
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "n_head", "D"), [(2, 130, 3, 64), (1, 17, 2, 20), (3, 1, 1, 16), (0, 5, 2, 16)])
def test_packed(B, T, n_head, D, dtype, device):
    """The same bits as flash_attention on the parts, whose accuracy is tested above; the gradient packed."""
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


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(4, 12, 1024, 1024, 64), Shape(1, 1, 16411, 16411, 64)], ids=str)
def test_sizes_of_gpt2(shape, device):
    check(*qkv(shape, torch.bfloat16, device))


def test_more_keys_than_16k(device):
    check(*qkv(Shape(1, 1, 3, 16411, 16), torch.float16, device))


def test_more_queries_than_16k(device):
    check(*qkv(Shape(1, 1, 16411, 3, 16), torch.float16, device), causal=False)


def test_the_future_does_not_matter_to_the_last_bit(device):
    q, k, v = qkv(Shape(1, 1, 150, 150, 64), torch.float16, device)
    o = flash_attention(q, k, v)
    for t in (0, 63, 64, 127, 128, 148):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, t + 1 :] = 7.0
        assert torch.equal(flash_attention(*later)[:, :, : t + 1], o[:, :, : t + 1])
        assert not torch.equal(flash_attention(*later)[:, :, t + 1 :], o[:, :, t + 1 :])


def test_tiles_that_nothing_sees_are_not_visited(device):
    """A NaN there would become 0 * NaN: keys of the second tile for queries of the first, and the other way round."""
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


def test_rows_are_convex_combinations(device):
    q, k, v = qkv(Shape(1, 2, 140, 140, 32), torch.float32, device)
    o = flash_attention(q, k, v)
    assert (o <= v.cummax(2).values + 1e-5).all()
    assert (o >= v.cummin(2).values - 1e-5).all()
    torch.testing.assert_close(flash_attention(q, k, torch.ones_like(v)), torch.ones_like(v), rtol=0, atol=1e-6)


def test_a_nan_in_a_query_stays_in_its_row_and_one_in_a_key_in_later_rows(device):
    q, k, v = qkv(Shape(1, 1, 70, 70, 32), torch.float32, device)
    q[0, 0, 5] = float("nan")
    k[0, 0, 66] = float("nan")
    rows = flash_attention(q, k, v).isnan().any(-1)[0, 0]
    assert rows.nonzero().flatten().tolist() == [5, 66, 67, 68, 69]


def test_the_same_bits_every_time(device):
    inputs = qkv(Shape(1, 2, 200, 200, 64), torch.float16, device)
    first, second = (outputs_and_gradients(flash_attention, inputs) for _ in range(2))
    for a, b in zip(first.outputs + first.gradients, second.outputs + second.gradients):
        assert torch.equal(a, b)


def test_what_cannot_be_is_refused(device):
    q, k, v = qkv(Shape(1, 2, 8, 8, 16), torch.float32, device)
    refused = partial(pytest.raises, ValueError)
    with pytest.raises(TypeError, match=r"flash_attention: q is torch.float32 and k is torch.float16: convert one"):
        flash_attention(q, k.half(), v)
    with refused(match=r"flash_attention: k has shape \(1, 1, 8, 16\): it must be \(1, 2, 8, 16\)"):
        flash_attention(q, k[:, :1], v)
    with refused(match=r"flash_attention: v has shape \(1, 2, 7, 16\)"):
        flash_attention(q, k, v[:, :, :7])
    with refused(match=r"flash_attention: q has shape \(8, 16\): it must be \(B, H, T, D\)"):
        flash_attention(q[0, 0], k, v)
    for D in (15, 257):
        with refused(match=rf"flash_attention: heads have {D} dimensions: 16 to 256 are possible"):
            flash_attention(*(torch.zeros(1, 1, 4, D, device=device) for _ in "qkv"))
    for scale in (0.0, -1.0, math.nan, math.inf):
        with refused(match=r"scale is .*: it must be positive and finite"):
            flash_attention(q, k, v, scale=scale)
    with refused(match=r"q is on .* and v on meta"):
        flash_attention(q, k, v.to("meta"))
    with refused(match=r"attention: qkv has shape \(2, 3, 100\): it must be \(B, T, 3 \* 4 heads \* D\)"):
        attention(torch.zeros(2, 3, 100, device=device), 4)
    with refused(match=r"attention: heads have 8 dimensions"):
        attention(torch.zeros(2, 3, 48, device=device), 2)
