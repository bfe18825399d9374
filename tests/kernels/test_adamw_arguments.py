"""Arguments that adamw_ refuses."""

import pytest
import torch

from gpt2fast.kernels.adamw import ParameterTable

pytestmark = pytest.mark.kernel


def bad(**changes) -> list:
    row = {name: torch.zeros(6) for name in ("gradient", "weight", "exp_avg", "exp_avg_sq")}
    return list((row | {"copy": None, "step": torch.zeros(())} | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(6).bfloat16()}, TypeError, "weight is torch.bfloat16: weights and moments are float32"),
        ({"exp_avg_sq": torch.zeros(6).half()}, TypeError, "exp_avg_sq is torch.float16: weights and moments are"),
        ({"copy": torch.zeros(6)}, TypeError, "copy is torch.float32: .* copies are half types"),
        ({"gradient": torch.zeros(6).double()}, TypeError, "gradient is torch.float64: it must be float32, bfloat16"),
        ({"gradient": torch.zeros(7)}, ValueError, r"gradient has shape \(7,\): it must be \(6,\)"),
        ({"exp_avg": torch.zeros(12)[::2]}, ValueError, r"exp_avg has strides \(2,\): it must be contiguous"),
        ({"step": torch.zeros(1)}, ValueError, r"step has shape \(1,\): it must be \(\)"),
        ({"step": torch.zeros(()).double()}, TypeError, "step is torch.float64: it must be float32"),
        ({"exp_avg": torch.zeros(6, device="meta")}, ValueError, "weight is on cpu and exp_avg on meta: move one"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changes, error, message, monkeypatch):
    monkeypatch.setattr("gpt2fast.kernels.registration.INTERPRETED", True)
    with pytest.raises(error, match=f"adamw: {message}"):
        ParameterTable(torch.device("cpu")).refresh([bad(**changes)])


def test_weights_on_two_devices_are_refused(monkeypatch):
    monkeypatch.setattr("gpt2fast.kernels.registration.INTERPRETED", True)
    with pytest.raises(ValueError, match="a weight is on cpu and the first one on meta: move one of them"):
        ParameterTable(torch.device("meta")).refresh([bad()])
