"""How exact a kernel must be: as exact as honest arithmetic at its dtype, measured against float64.

    max |got - truth| <= factor * max |base - truth| + floor     2, and 3 for dq, dk, dv (flash-attention's own tests)
    rms(got - truth)  <=    1.5 * rms(base - truth)  + floor     truncation instead of rounding may pass the first

The floors, in units of eps times the largest and the root mean square of `truth`, are for results that honest
arithmetic happens to hit nearly exactly.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RMS_FACTOR = 1.5
FLOORS = {torch.float32: (4.0, 2.0), torch.bfloat16: (0.5, 0.05), torch.float16: (0.5, 0.05)}  # of max, of rms


class Results(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]
    cotangents: list[Tensor]


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


def outputs_and_gradients(
    fn: Callable, inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None
) -> Results:
    """What fn(*inputs) returns, and the gradient of every input, of sum(output * cotangent).

    Cotangents that are not given are drawn, in the outputs' dtypes, and the same for the same shapes.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]  # strides are kept
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        generator = torch.Generator().manual_seed(len(inputs))
        cotangents = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return Results([o.detach() for o in outputs], list(gradients), list(cotangents))


def assert_kernel_is_as_accurate(
    kernel: Callable,
    reference: Callable,
    inputs: Sequence[Tensor],
    *,
    base: Callable | None = None,
    cotangents: Sequence[Tensor] | None = None,
    gradient_factor: float = 2.0,
) -> None:
    """The rule above for each output and each gradient of `kernel`; inputs must come out of it unchanged.

    Truth: `reference` in float64. Base: `reference` in fp32 on the same inputs, each result rounded once, or what
    base(inputs, cotangents) returns, a Results at the inputs' dtype, where honest arithmetic has to round more often.
    """
    before = [x.clone() for x in inputs]
    got = outputs_and_gradients(kernel, inputs, cotangents)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before)), "the kernel wrote to its inputs"
    doubles, singles = ([x.to(dtype) for x in inputs] for dtype in (torch.float64, torch.float32))
    truth = outputs_and_gradients(reference, doubles, [c.double() for c in got.cotangents])
    if base:
        honest = base(inputs, got.cotangents)
    else:
        honest = outputs_and_gradients(reference, singles, [c.float() for c in got.cotangents])
    for kind, factor in (("outputs", 2.0), ("gradients", gradient_factor)):
        for i, (g, t, b) in enumerate(zip(*(getattr(results, kind) for results in (got, truth, honest)), strict=True)):
            if kind == "gradients":
                assert g.dtype == inputs[i].dtype
            assert_as_accurate(g, t, b.to(g.dtype), factor=factor, name=f"{kind[:-1]} {i}")
