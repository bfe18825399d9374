"""The gradient's norm on a CPU: as exact as its fp32 result, and the same for any number of threads."""

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
def compiles_nothing(monkeypatch):
    monkeypatch.setattr(optim, "_compile", lambda fn: fn)


def gradients(dtype) -> list[torch.Tensor]:
    """Large, mostly small numbers, short, one, none, and a matrix that is not contiguous."""
    random = torch.Generator().manual_seed(0)
    sizes = (LARGE, 1024, 1023, 1, 0)
    found = [torch.randn(n, generator=random) for n in sizes]
    found[0][torch.rand(LARGE, generator=random) < 0.5] *= 1e-3
    return [g.to(dtype) for g in (*found, torch.randn(70, 50, generator=random).T)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_exact_within_rounding_of_its_parts(dtype):
    """torch.dot and torch's norm, of the whole tensor, lose up to 1e-4 of it here."""
    given = gradients(dtype)
    truth = torch.stack([(g.double() ** 2).sum() for g in given]).sum().sqrt()
    assert abs(optim.gradient_norm(given).double() - truth) < 2e-6 * truth


def test_threads_change_its_last_bits_at_most(threads):
    norms = []
    for n in (1, 2):
        threads(n)
        norms.append(optim.gradient_norm(gradients(torch.float32)))
    assert abs(norms[0] - norms[1]) <= 2**-22 * norms[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, LARGE - 1])
def test_what_is_not_finite_is_seen_anywhere(bad, place):
    given = gradients(torch.float32)
    given[0][place] = bad
    assert not optim.gradient_norm(given).isfinite()


def test_decay_is_for_matrices_only():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    decayed, plain = optim.decay_groups(model, 0.1)
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.1, 0.0]
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    group = optim.adamw(model, 0.1).param_groups[0]
    assert group["betas"] == (0.9, 0.95)
    assert group["fused"]


def test_schedule():
    def rate(step):
        return optim.learning_rate(step, peak=1.0, floor=0.1, warmup=10, total=101)

    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == rate(10) == 1.0
    assert rate(55) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)
    assert rate(1000) == pytest.approx(0.1)
    assert all(rate(i) > rate(i + 1) for i in range(10, 100))
