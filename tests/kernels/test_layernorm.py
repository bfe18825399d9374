"""LayerNorm and residual add + LayerNorm against torch, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast import reference
from gpt2fast.kernels import add_layer_norm, layer_norm
from tests.tools.accuracy import assert_kernel_is_as_accurate
from tests.tools.inputs import DTYPES, LAYOUTS, VALUES, normal

pytestmark = pytest.mark.kernel


EPS = 1e-5

# (rows, columns): GPT-2's; XL's 1600, not a power of two; the widest; primes; one row; one column; more rows than the
# programs of the backward take at a time; no rows
SHAPES = [(9, 768), (5, 1600), (2, 16384), (13, 37), (1, 64), (6, 1), (100, 33), (0, 768)]


def plain(x, w, b):
    return layer_norm(x, w, b, EPS)


def plain_reference(x, w, b):
    return reference.layer_norm(x, w, b, EPS)


def added(x, y, w, b):
    return add_layer_norm(x, y, w, b, EPS)


def added_reference(x, y, w, b):
    return reference.add_layer_norm(x, y, w, b, EPS)


def rounded_sum_reference(dtype):
    """The sum is a result, so it is rounded to its dtype; LayerNorm takes the rounded sum."""

    def fn(x, y, w, b):
        s = x + y
        s = s + (s.detach().to(dtype).to(s.dtype) - s.detach())
        return s, reference.layer_norm(s, w, b, EPS)

    return fn


def weights(N, dtype, device):
    return normal(N, dtype=dtype, device=device, seed=1), normal(N, dtype=dtype, device=device, seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape, dtype, device):
    x = normal(*shape, dtype=DTYPES[dtype], device=device)
    assert_kernel_is_as_accurate(plain, plain_reference, [x, *weights(shape[1], DTYPES[dtype], device)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layer_norm(shape, dtype, device):
    x, y = (normal(*shape, dtype=DTYPES[dtype], device=device, seed=seed) for seed in (3, 4))
    fn = rounded_sum_reference(DTYPES[dtype])
    assert_kernel_is_as_accurate(added, fn, [x, y, *weights(shape[1], DTYPES[dtype], device)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
def test_other_values(values, dtype, device):
    x = normal(6, 768, dtype=DTYPES[dtype], device=device, values=values)
    wb = weights(768, DTYPES[dtype], device)
    assert_kernel_is_as_accurate(plain, plain_reference, [x, *wb])
    fn = rounded_sum_reference(DTYPES[dtype])
    assert_kernel_is_as_accurate(added, fn, [x, normal(6, 768, dtype=DTYPES[dtype], device=device) / 8, *wb])


@pytest.mark.parametrize("x_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("y_dtype", ["fp32", "bf16"])
def test_a_residual_stream_of_another_dtype(x_dtype, y_dtype, device):
    x, y = normal(7, 96, dtype=DTYPES[x_dtype], device=device), normal(7, 96, dtype=DTYPES[y_dtype], device=device)
    fn = rounded_sum_reference(torch.promote_types(x.dtype, y.dtype))
    assert_kernel_is_as_accurate(added, fn, [x, y, *weights(96, torch.float32, device)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, y = (LAYOUTS[layout](normal(6, 300, device=device, seed=seed)) for seed in (0, 1))
    w, b = (LAYOUTS[layout](t) for t in weights(300, torch.float32, device))
    assert_kernel_is_as_accurate(plain, plain_reference, [x, w, b])
    assert_kernel_is_as_accurate(added, added_reference, [x, y, w, b])


@pytest.mark.long
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.integers(1, 2100), st.sampled_from(list(DTYPES)))
def test_any_shape(device, lead, N, dtype):
    x, y = (normal(*lead, N, dtype=DTYPES[dtype], device=device, seed=seed) for seed in (0, 1))
    fn = rounded_sum_reference(DTYPES[dtype])
    assert_kernel_is_as_accurate(added, fn, [x, y, *weights(N, DTYPES[dtype], device)])


@pytest.mark.gpu
@pytest.mark.parametrize("N", [768, 1024, 1280, 1600])
def test_sizes_of_gpt2(N, device):
    x, y = normal(65536, N, device=device, seed=3), normal(65536, N, dtype=torch.bfloat16, device=device, seed=4)
    assert_kernel_is_as_accurate(added, rounded_sum_reference(x.dtype), [x, y, *weights(N, torch.float32, device)])


def test_half_of_the_outputs_may_be_unused(device):
    x, y = (normal(5, 48, device=device, seed=seed).requires_grad_() for seed in (0, 1))
    w, b = (t.requires_grad_() for t in weights(48, torch.float32, device))
    for i in (0, 1):
        grads = torch.autograd.grad(added(x, y, w, b)[i].square().sum(), [x, y, w, b], allow_unused=True)
        truth = torch.autograd.grad(added_reference(x, y, w, b)[i].square().sum(), [x, y, w, b], allow_unused=True)
        for g, t in zip(grads, truth):
            assert (g is None) == (t is None)
            if t is not None:
                torch.testing.assert_close(g, t, rtol=1e-5, atol=1e-5)


def test_rows_have_the_mean_of_b_and_the_deviation_of_w(device):
    x = normal(11, 512, device=device, values="offset")
    o = plain(x, torch.full((512,), 2.0, device=device), torch.full((512,), 5.0, device=device))
    torch.testing.assert_close(o.mean(1), torch.full((11,), 5.0, device=device), rtol=0, atol=1e-4)
    torch.testing.assert_close(o.std(1, correction=0), torch.full((11,), 2.0, device=device), rtol=0, atol=1e-3)


def test_a_nan_stays_in_its_row(device):
    x = normal(4, 40, device=device)
    x[1, 3] = float("nan")
    o = plain(x, *weights(40, torch.float32, device))
    assert o.isnan().any(1).tolist() == [False, True, False, False]


def test_gradients_of_weights_are_the_same_every_time(device):
    x, (w, b) = normal(3000, 24, device=device), weights(24, torch.float32, device)
    w.requires_grad_()
    first, second = (torch.autograd.grad(plain(x, w, b).square().sum(), w)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_bad_arguments_are_refused(device):
    x, (w, b) = normal(4, 8, device=device), weights(8, torch.float32, device)
    with pytest.raises(ValueError, match=r"layer_norm: w has shape \(7,\): it must be \(8,\)"):
        plain(x, w[:7], b)
    with pytest.raises(ValueError, match=r"add_layer_norm: y has shape \(1, 8\): it must be \(4, 8\)"):
        added(x, x[:1], w, b)
    with pytest.raises(TypeError, match=r"layer_norm: w is torch.bfloat16 and b is torch.bfloat16: both must be"):
        plain(x, w.bfloat16(), b.bfloat16())
    with pytest.raises(TypeError, match=r"add_layer_norm: x is torch.float16 and y is torch.bfloat16"):
        added(x.half(), x.bfloat16(), w, b)
    with pytest.raises(ValueError, match=r"the last dimension is 16385: at most 16384"):
        plain(torch.zeros(1, 16385, device=device), *weights(16385, torch.float32, device))
    with pytest.raises(ValueError, match=r"add_layer_norm: x is on .* and y on meta"):
        added(x, x.to("meta"), w, b)
