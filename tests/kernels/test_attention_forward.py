"""Flash attention against softmax(q k^T) v, forward and backward, packed and not."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.kernels import attention, flash_attention
from tests.tools.accuracy import outputs_and_gradients
from tests.tools.attention import (
    SHAPES,
    Shape,
    any_strides,
    check,
    fully_masked_tiles_are_not_visited,
    huge_logits,
    packed_is_flash_attention,
    qkv,
    values_that_are_all_equal,
)
from tests.tools.inputs import DTYPES

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention(shape, causal, dtype, device):
    check(*qkv(SHAPES[shape], DTYPES[dtype], device), causal)


@pytest.mark.long
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.integers(2, 150), st.integers(16, 70),
    st.booleans(), st.sampled_from(["bf16", "fp16"]),
)  # fmt: skip
def test_any_shape(device, B, H, T_q, T_k, D, causal, dtype):
    # at least two keys: the score of a single one has no gradient, see test_values_that_are_all_equal
    check(*qkv(Shape(B, H, T_q, T_k, D), DTYPES[dtype], device), causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["offset", "tiny", "one-hot"])
def test_other_values(values, dtype, device):
    """Other values of v; for those of q and k see the next test."""
    shape = Shape(1, 1, 70, 70, 64)
    check(*qkv(shape, DTYPES[dtype], device)[:2], qkv(shape, DTYPES[dtype], device, values)[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(dtype, device):
    huge_logits(dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T_q", "T_k"), [(1, 1), (5, 1), (40, 40)])
def test_values_that_are_all_equal(T_q, T_k, dtype, device):
    values_that_are_all_equal(T_q, T_k, dtype, device)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_scale(scale, device):
    check(*qkv(Shape(1, 1, 40, 40, 32), torch.float16, device), scale=scale)


def test_any_strides(device):
    any_strides(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "n_head", "D"), [(2, 130, 3, 64), (1, 17, 2, 20), (3, 1, 1, 16), (0, 5, 2, 16)])
def test_packed(B, T, n_head, D, dtype, device):
    packed_is_flash_attention(B, T, n_head, D, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(4, 12, 1024, 1024, 64), Shape(1, 1, 16411, 16411, 64)], ids=str)
def test_sizes_of_gpt2(shape, device):
    check(*qkv(shape, torch.bfloat16, device))


@pytest.mark.long
def test_more_keys_than_16k(device):
    check(*qkv(Shape(1, 1, 3, 16411, 16), torch.float16, device))


@pytest.mark.long
def test_more_queries_than_16k(device):
    check(*qkv(Shape(1, 1, 16411, 3, 16), torch.float16, device), causal=False)


def test_fully_masked_tiles_are_not_visited(device):
    fully_masked_tiles_are_not_visited(device)


def test_the_same_bits_every_time(device):
    inputs = qkv(Shape(1, 2, 200, 200, 64), torch.float16, device)
    first, second = (outputs_and_gradients(flash_attention, inputs) for _ in range(2))
    for a, b in zip(first.outputs + first.gradients, second.outputs + second.gradients):
        assert torch.equal(a, b)


def test_bad_arguments_are_refused(device):
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
