"""How exact a kernel must be: as exact as honest arithmetic at its dtype, measured against float64.

    max |got - truth| <= factor * max |base - truth| + floor     2, and 3 for dq, dk, dv (flash-attention's own tests)
    rms(got - truth)  <=    1.5 * rms(base - truth)  + floor     truncation instead of rounding may pass the first

The floors, in units of eps times the largest and the root mean square of `truth`, are for results that honest
arithmetic happens to hit nearly exactly.
"""

import torch
from torch import Tensor

RMS_FACTOR = 1.5
FLOORS = {torch.float32: (4.0, 2.0), torch.bfloat16: (0.5, 0.05), torch.float16: (0.5, 0.05)}  # of max, of rms


def assert_as_accurate(got: Tensor, truth: Tensor, base: Tensor, *, factor: float = 2.0, name: str = "result") -> None:
    """AssertionError unless `got` is as near to `truth` as `base` is.

    `truth`: the reference in float64, on the same, already rounded inputs. `base`: what an honest implementation
    makes of them at the dtype of `got`, which it fixes. NaN and infinity never pass, wherever they stand.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}, not float64"
    assert got.shape == truth.shape == base.shape, f"{name}: shapes {got.shape}, {truth.shape}, {base.shape} differ"
    assert got.dtype == base.dtype, f"{name} is {got.dtype} and should be {base.dtype}"
    if got.numel() == 0:
        return
    got, truth, base = (tensor.detach().cpu() for tensor in (got, truth, base))
    for what, tensor in (("it", got), ("the truth", truth), ("the base", base)):
        bad = int((~tensor.isfinite()).sum())
        assert not bad, f"{name}: {what} has {bad} of {tensor.numel()} values NaN or infinite"
    eps, floors = torch.finfo(got.dtype).eps, FLOORS[got.dtype]
    for measure, norm, times, floor in (("max", _max, factor, floors[0]), ("rms", _rms, RMS_FACTOR, floors[1])):
        error, honest, floor = norm(got.double() - truth), norm(base.double() - truth), floor * eps * norm(truth)
        ratio = f"{error / honest:.3g}" if honest else "infinitely many"
        assert error <= times * honest + floor, (
            f"{name}: {measure} error {error:.3e} is {ratio} times the honest {honest:.3e}: "
            f"at most {times:g} times and {floor:.3e} are allowed"
        )


def _max(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
