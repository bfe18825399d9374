"""The required accuracy of a kernel: that of honest arithmetic at its dtype, measured against float64.

    max |got - truth| <= factor * max |base - truth| + floor     2, and 3 for dq, dk, dv (flash-attention's own tests)
    rms(got - truth)  <=    1.5 * rms(base - truth)  + floor     catches truncation, which may pass the first

The floors, in units of eps times the largest value and the root mean square of `truth`, are for results that honest
arithmetic happens to compute almost exactly.

An error is a random draw, and differs on another CPU, which adds in another order. A result with few numbers (a bias of
width 1 has one) says little about how large honest errors are. There the errors for nearby inputs count as well, and
the second rule, which compares the scatter of errors, is left out.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RMS_FACTOR = 1.5
FEW = 128  # with this many independent errors, the rms of two draws differs by 1.5 times once in a million
NEARBY = [1 - j / 64 for j in range(1, 16)]  # factors of the inputs, to draw honest errors again
FLOORS = {torch.float32: (4.0, 2.0), torch.bfloat16: (0.5, 0.05), torch.float16: (0.5, 0.05)}  # of max, of rms


class Results(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]
    cotangents: list[Tensor]


def assert_as_accurate(
    got: Tensor, truth: Tensor, base: Tensor, *, factor: float = 2.0, name: str = "result",
    nearby: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:  # fmt: skip
    """Raise AssertionError unless `got` is as close to `truth` as `base` is.

    `truth`: the reference in float64, on the same, already rounded inputs. `base`: an honest implementation's result,
    whose dtype `got` must have. NaN and infinity never pass, in none of the three. `nearby`: truth and base for nearby
    inputs, if `got` has few numbers; then the largest of all their errors counts.
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
    errors = torch.stack([b.double() - t for t, b in ((truth, base), *nearby)])
    rules = (("max", _max, factor, floors[0]), ("rms", _rms, RMS_FACTOR, floors[1]))
    for measure, norm, times, floor in rules[: 1 if nearby else 2]:
        error, honest, floor = norm(got.double() - truth), norm(errors), floor * eps * norm(truth)
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
    """Return the outputs of fn(*inputs), and the gradient of sum(output * cotangent) for every input.

    Cotangents that are not given are drawn in the outputs' dtypes, the same ones for the same shapes.
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
    few: float = FEW,
) -> None:
    """Apply the rules above to each output and each gradient of `kernel`, which must not change its inputs.

    Truth: `reference` in float64. Base: `reference` in fp32 on the same inputs, each result rounded once; or, where
    honest arithmetic has to round more often, the Results at the inputs' dtype that base(inputs, cotangents) returns.
    Results with fewer than `few` numbers are also judged by nearby inputs' errors.
    """
    before = [x.clone() for x in inputs]
    got = outputs_and_gradients(kernel, inputs, cotangents)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before)), "the kernel wrote to its inputs"

    def truth_and_base(inputs: Sequence[Tensor]) -> tuple[Results, Results]:
        doubles, singles = ([x.to(dtype) for x in inputs] for dtype in (torch.float64, torch.float32))
        truth = outputs_and_gradients(reference, doubles, [c.double() for c in got.cotangents])
        if base:
            return truth, base(inputs, got.cotangents)
        return truth, outputs_and_gradients(reference, singles, [c.float() for c in got.cotangents])

    here, nearby = truth_and_base(inputs), None
    for kind, factor in (("outputs", 2.0), ("gradients", gradient_factor)):
        for i, (g, t, b) in enumerate(zip(*(getattr(results, kind) for results in (got, *here)), strict=True)):
            if kind == "gradients":
                assert g.dtype == inputs[i].dtype
            others = []
            if 0 < g.numel() < few:
                nearby = nearby or [truth_and_base([x * scale for x in inputs]) for scale in NEARBY]
                pairs = [[getattr(results, kind)[i] for results in pair] for pair in nearby]
                others = [(t.cpu(), b.to(g.dtype).cpu()) for t, b in pairs]
            assert_as_accurate(g, t, b.to(g.dtype), factor=factor, name=f"{kind[:-1]} {i}", nearby=others)
