"""tanh-GELU and bias + GELU against torch, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.kernels import bias_gelu, gelu
from tests.tools.accuracy import assert_kernel_is_as_accurate
from tests.tools.inputs import DTYPES, LAYOUTS, VALUES, normal

pytestmark = pytest.mark.kernel


SHAPES = {
    "GPT-2's": (4, 3072),
    "one": (1,),
    "odd": (7, 129),
    "a scalar": (),
    "empty": (0, 8),
    "longer than a block": (3, 22111),
}


def reference(x):
    return F.gelu(x, approximate="tanh")


def bias_reference(x, b):
    return reference(x + b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape, dtype, device):
    assert_kernel_is_as_accurate(gelu, reference, [normal(*SHAPES[shape], dtype=DTYPES[dtype], device=device)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
def test_gelu_of_other_values(values, dtype, device):
    x = normal(5, 100, dtype=DTYPES[dtype], device=device, values=values)
    assert_kernel_is_as_accurate(gelu, reference, [x])
    assert_kernel_is_as_accurate(bias_gelu, bias_reference, [x, normal(100, dtype=DTYPES[dtype], device=device)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, b = LAYOUTS[layout](normal(6, 300, device=device)), LAYOUTS[layout](normal(300, device=device))
    assert_kernel_is_as_accurate(gelu, reference, [x])
    assert_kernel_is_as_accurate(bias_gelu, bias_reference, [x, b])


# (rows, columns): GPT-2's; XL's 6400; primes; one row; one column; more rows and columns than a tile; no rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3072), (2, 6400), (13, 17), (1, 300), (300, 1), (600, 700), (0, 8)])
def test_bias_gelu(shape, dtype, device):
    x, b = (normal(*s, dtype=DTYPES[dtype], device=device) for s in (shape, shape[1:]))
    assert_kernel_is_as_accurate(bias_gelu, bias_reference, [x, b])


@pytest.mark.long
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 400), st.sampled_from(list(DTYPES)))
def test_any_shape(device, lead, N, dtype):
    x, b = normal(*lead, N, dtype=DTYPES[dtype], device=device), normal(N, dtype=DTYPES[dtype], device=device)
    assert_kernel_is_as_accurate(bias_gelu, bias_reference, [x, b])


@pytest.mark.gpu
@pytest.mark.parametrize("N", [3072, 6400])
def test_sizes_of_gpt2(N, device):
    x, b = normal(65536, N, dtype=torch.bfloat16, device=device), normal(N, dtype=torch.bfloat16, device=device)
    assert_kernel_is_as_accurate(bias_gelu, bias_reference, [x, b])


def test_the_far_ends(device):
    x = torch.tensor([-1e10, -1e4, -20.0, -0.0, 0.0, 20.0, 1e4, 1e10, float("nan")], device=device, requires_grad=True)
    o = gelu(x)
    o.sum().backward()
    assert torch.equal(o.detach()[:-1], torch.tensor([-0.0, -0.0, -0.0, -0.0, 0.0, 20.0, 1e4, 1e10], device=device))
    assert torch.equal(x.grad[:-1], torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1], device=device))
    assert o[-1].isnan()
    assert x.grad[-1].isnan()


def test_the_left_tail_keeps_its_digits(device):
    x = torch.linspace(-6, -3, 1000, device=device)
    truth = reference(x.double())
    assert ((gelu(x).double() - truth) / truth).abs().max() < 1e-5  # torch's own tanh loses all digits at -5.5


def test_the_bias_gradient_is_the_same_every_time(device):
    x, b = normal(5000, 40, device=device), normal(40, device=device).requires_grad_()
    first, second = (torch.autograd.grad(bias_gelu(x, b).square().sum(), b)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_bad_arguments_are_refused(device):
    x, b = normal(4, 8, device=device), normal(8, device=device)
    with pytest.raises(TypeError, match=r"bias_gelu: x is torch.float32 and b is torch.bfloat16: convert one of them"):
        bias_gelu(x, b.bfloat16())
    with pytest.raises(ValueError, match=r"bias_gelu: b has shape \(7,\): it must be \(8,\)"):
        bias_gelu(x, b[:7])
    with pytest.raises(TypeError, match=r"gelu: x is torch.float64: it must be float32, bfloat16 or float16"):
        gelu(x.double())
    with pytest.raises(ValueError, match=r"bias_gelu: x is on .* and b on meta: move one of them"):
        bias_gelu(x, b.to("meta"))
