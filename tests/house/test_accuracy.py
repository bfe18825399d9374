"""The accuracy rules themselves: honest rounding passes them, and anything worse fails."""

import pytest
import torch

from tests.tools.accuracy import assert_as_accurate, assert_kernel_is_as_accurate

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
AS_INT = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture
def truth() -> torch.Tensor:
    return torch.randn(64, 129, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def truncated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round towards zero."""
    nearest = x.to(dtype)
    too_large = nearest.double().abs() > x.abs()
    return torch.where(too_large, nearest.view(AS_INT[dtype]) - 1, nearest.view(AS_INT[dtype])).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honestly_rounded_results_pass(truth, dtype):
    assert_as_accurate((truth / 3).float().mul(3).to(dtype), truth, truth.to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_truncation_instead_of_rounding_fails_by_the_rms_rule(truth, dtype):
    with pytest.raises(AssertionError, match=r"rms error .* is (1\.9|2\.0)\d* times the honest"):
        assert_as_accurate(truncated(truth, dtype), truth, truth.to(dtype))


def test_tf32_fails_as_fp32(truth):
    with pytest.raises(AssertionError, match="max error"):
        assert_as_accurate(truth.to(torch.float16).float(), truth, truth.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_wrong_value_fails_by_the_max_rule(truth, dtype):
    got = truth.to(dtype)
    i = truth.abs().flatten().argmax()  # its rounding error may be the largest, and is far below this one
    got.view(-1)[i] *= 1 + 8 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="dx: max error .* times the honest .*: at most 2 times"):
        assert_as_accurate(got, truth, truth.to(dtype), name="dx")


def test_the_factor_widens_the_max_rule_only():
    truth, base = torch.zeros(2, dtype=torch.float64), torch.full((2,), 1.0)
    near, far = torch.tensor([2.5, 0.0]), torch.full((2,), 1.6)
    with pytest.raises(AssertionError, match=r"max error 2.500e\+00 is 2.5 times"):
        assert_as_accurate(near, truth, base)
    with pytest.raises(AssertionError, match=r"rms error 1.768e\+00 is 1.77 times the honest .*: at most 1.5 times"):
        assert_as_accurate(near, truth, base, factor=3)
    with pytest.raises(AssertionError, match="rms error"):
        assert_as_accurate(far, truth, base, factor=3)
    assert_as_accurate(near * 0.8, truth, base)


def test_for_few_numbers_the_errors_of_nearby_inputs_count_too():
    third, seventh = torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([1 / 7], dtype=torch.float64)
    off = torch.tensor([6e-6])
    lucky, usual = (third, third.float()), (seventh, (seventh + 4e-6).float())
    with pytest.raises(AssertionError, match="max error"):
        assert_as_accurate(third.float() + off, *lucky)
    assert_as_accurate(third.float() + off, *lucky, nearby=[usual])
    with pytest.raises(AssertionError, match=r"max error .* is 2.5\d times the honest 4"):
        assert_as_accurate(third.float() + off * 5 / 3, *lucky, nearby=[usual])


def test_a_kernel_with_one_result_passes_by_nearby_inputs_and_fails_if_it_is_worse():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert_kernel_is_as_accurate(lambda x: x.flip(0).cumsum(0)[-1:], lambda x: x.sum(0, True), [x])
    with pytest.raises(AssertionError, match="output 0: max error"):
        assert_kernel_is_as_accurate(lambda x: x.half().float().sum(0, True), lambda x: x.sum(0, True), [x])


@pytest.mark.parametrize(
    ("dtype", "off", "passes"),
    [
        pytest.param(torch.float32, 1, True, id="fp32-within-2-eps-rms"),
        pytest.param(torch.float32, 3, False, id="fp32-beyond-2-eps-rms"),
        pytest.param(torch.bfloat16, 1, False, id="bf16-beyond-half-an-eps"),
    ],
)
def test_the_floors_decide_if_the_base_is_exact(dtype, off, passes):
    truth = torch.ones(8, dtype=torch.float64)
    got = torch.ones(8, dtype=dtype) + off * torch.finfo(dtype).eps
    if passes:
        return assert_as_accurate(got, truth, truth.to(dtype))
    with pytest.raises(AssertionError, match="infinitely many times the honest 0"):
        assert_as_accurate(got, truth, truth.to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("place", ["got", "truth", "base", "all"])
def test_nan_and_infinity_never_pass(truth, value, place):
    tensors = {"got": truth.float(), "truth": truth.clone(), "base": truth.float()}
    for name, tensor in tensors.items():
        if place in (name, "all"):
            tensor[3, 5] = value
    with pytest.raises(AssertionError, match="1 of 8256 values NaN or infinite"):
        assert_as_accurate(**tensors)


def test_another_shape_fails_even_if_it_would_broadcast(truth):
    row = truth[:1].expand(64, -1)
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate(truth[:1].float(), row, row.float())


def test_another_dtype_fails_even_if_it_is_more_exact(truth):
    with pytest.raises(AssertionError, match=r"result is torch.float32 and should be torch.bfloat16"):
        assert_as_accurate(truth.float(), truth, truth.bfloat16())


def test_a_truth_that_is_not_float64_is_refused(truth):
    with pytest.raises(AssertionError, match="not float64"):
        assert_as_accurate(truth.float(), truth.float(), truth.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_results_pass(dtype):
    empty = torch.empty(0, 3, dtype=dtype)
    assert_as_accurate(empty, empty.double(), empty)
