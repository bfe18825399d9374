"""The parts of a matmul that kernels share: which operands TMA can reach."""

from functools import partial

import pytest
import torch
from torch import Tensor

from gpt2fast.kernels import epilogue, launch, matmul
from gpt2fast.kernels.epilogue import linear_gelu_bwd, linear_gelu_fwd
from tests.tools.inputs import DTYPES, normal

pytestmark = pytest.mark.kernel


def inputs(M: int, C: int, F: int, dtype: torch.dtype, device, lead: tuple = ()) -> list[Tensor]:
    n = partial(normal, device=device)
    made = [n(*lead, M, C), n(F, C) / C**0.5, n(F, seed=1), n(C, F) / F**0.5, n(C, seed=2)]
    return [x.to(dtype) for x in made]


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted"),
    [
        ((9, 48, 200), "bf16", [True, True]),
        ((9, 48, 200), "fp16", [True, True]),
        ((9, 48, 200), "fp32", [False, False]),
        ((9, 37, 200), "bf16", [False, False]),  # rows of x, fc_w and dy have 74 bytes
        ((9, 48, 100), "bf16", [True, False]),  # rows of proj_w have 200 bytes
    ],
)
def test_tma_loads_the_operands_that_it_can_reach(shape, dtype, wanted, device, monkeypatch):
    """The tests of epilogue.py cover both ways of loading; this one shows which operands take which."""
    used = []
    monkeypatch.setattr(launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(epilogue, "matrix", lambda x, tma, *block: used.append(tma) or matmul.matrix(x, False))
    monkeypatch.setattr(epilogue, "_linear_gelu_fwd_kernel", {(n,): lambda **_: None for n in range(1, 99)})
    monkeypatch.setattr(epilogue, "_linear_gelu_bwd_kernel", {(n,): lambda **_: None for n in range(1, 99)})
    x, fc_w, fc_b, proj_w, _ = inputs(*shape, DTYPES[dtype], device)
    linear_gelu_fwd(x, fc_w, fc_b)
    linear_gelu_bwd(x, proj_w, normal(9, shape[2], dtype=DTYPES[dtype], device=device))
    assert used == [wanted[0]] * 2 + [wanted[1]] * 2
