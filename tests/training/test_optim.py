"""The gradient norm on a CPU, exact to a few bits for any number of threads; decay groups; the schedule."""

import pytest
import torch

from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from gpt2fast.training import optim
from tests.tools import tiny

LARGE = 3 * 2**20 + 7


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(optim, "_compile", lambda fn: fn)


def gradients(dtype) -> list[torch.Tensor]:
    """Return a large tensor, half of it tiny numbers, tensors of 1024, 1023, 1 and 0 numbers, and a transposed one."""
    random = torch.Generator().manual_seed(0)
    sizes = (LARGE, 1024, 1023, 1, 0)
    found = [torch.randn(n, generator=random) for n in sizes]
    found[0][torch.rand(LARGE, generator=random) < 0.5] *= 1e-3
    return [g.to(dtype) for g in (*found, torch.randn(70, 50, generator=random).T)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_exact_within_rounding(dtype):
    """torch.dot and torch's norm of the whole tensor have errors of up to 1e-4 here."""
    given = gradients(dtype)
    truth = torch.stack([(g.double() ** 2).sum() for g in given]).sum().sqrt()
    assert abs(optim.gradient_norm(given).double() - truth) < 2e-6 * truth


def test_threads_change_only_the_last_bits_of_the_norm(threads):
    norms = []
    for n in (1, 2):
        threads(n)
        norms.append(optim.gradient_norm(gradients(torch.float32)))
    assert abs(norms[0] - norms[1]) <= 2**-22 * norms[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, LARGE - 1])
def test_the_norm_shows_a_number_that_is_not_finite(bad, place):
    given = gradients(torch.float32)
    given[0][place] = bad
    assert not optim.gradient_norm(given).isfinite()


def test_only_matrices_decay():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    decayed, plain = optim.decay_groups(model, 0.1)
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.1, 0.0]
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    group = optim.adamw(model, 0.1).param_groups[0]
    assert group["betas"] == (0.9, 0.95)
    assert group["fused"]


def test_the_learning_rate_warms_up_and_falls_to_the_floor():
    def rate(step):
        return optim.learning_rate(step, peak=1.0, floor=0.1, warmup=10, total=101)

    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == rate(10) == 1.0
    assert rate(55) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)
    assert rate(1000) == pytest.approx(0.1)
    assert all(rate(i) > rate(i + 1) for i in range(10, 100))
