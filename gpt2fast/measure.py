"""The comparison of an op's implementations: first whether they are correct, then how long they take.

    verified   outputs and gradients against torch in exact fp32: an error at most twice torch's at the run's precision
    timed      forward + backward: the candidates take turns, and the median counts

The inputs are random, with the shapes and dtypes that the model passes to the op in training; weights are drawn from
the distribution of the initial ones.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpt2fast import ops
from gpt2fast.errors import RunError, describe_error
from gpt2fast.machine.device import DTYPES, Precision, autocast, device_name, synchronize
from gpt2fast.model import EPS, INIT_STD
from gpt2fast.ops import OpsConfig

TIMES_WORSE = 2.0  # allowed error relative to torch's at the same precision
FLOORS = {"fp32": 1e-5, "bf16": 4e-4, "fp16": 5e-5}  # allowed relative errors where torch happens to have none
SECONDS, ROUNDS = 0.25, 5  # the time for one op, and the least number of samples for each candidate
SAMPLE_SECONDS, CALLS = 0.01, 10  # a sample is as many calls as fit into this time, at most this many

Result = float | str  # milliseconds, or why the implementation is not used


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a run's ops (B sequences of T tokens, width C, H attention heads, an LM head of V rows), and how it
    computes.

    `residual`: the dtype of the residual stream.
    """

    B: int
    T: int
    C: int
    H: int
    V: int
    vocab_size: int
    precision: Precision
    tf32: bool
    compiled: bool
    residual: Precision = "fp32"


@dataclass(frozen=True)
class Call:
    """One call of an op: the tensors that get gradients, the other arguments, the gradients of the outputs."""

    leaves: list[Tensor]
    others: tuple
    cotangents: list[Tensor]

    def exact(self) -> "Call":
        """Return the call with the same values in fp32."""
        leaves = [x.detach().float().requires_grad_() for x in self.leaves]
        others = tuple(torch.float32 if isinstance(x, torch.dtype) else x for x in self.others)
        return Call(leaves, others, [x.float() for x in self.cotangents])


def calls(op: str, work: Workload, device: torch.device, B: int) -> list[Call]:
    """Return the calls of `op` in a block, or in the model, for B sequences: shapes and dtypes as in training."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the global generator unchanged
    T, C, low, fp32 = work.T, work.C, DTYPES[work.precision], torch.float32
    residual = DTYPES[work.residual]

    def normal(*shape: int, dtype: torch.dtype = low, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [normal(*shape, dtype=fp32, std=INIT_STD) for shape in shapes]

    x = partial(normal, B, T, C)
    made: list[tuple[list[Tensor], tuple, list[Tensor]]]
    if op == "embedding":
        idx = torch.randint(work.vocab_size, (B, T), generator=generator, device=device)
        made = [(weights((work.V, C), (T, C)), (idx, residual), [x(dtype=residual)])]
    elif op in ("layer_norm", "add_layer_norm"):
        w, b = weights((C,), (C,))
        add = op == "add_layer_norm"
        leaves = [x(dtype=residual), x(), w + 1, b] if add else [x(dtype=residual), w + 1, b]
        made = [(leaves, (EPS,), [x(dtype=residual), x()] if add else [x()])]
    elif op == "attention":
        made = [([normal(B, T, 3 * C)], (work.H,), [x()])]
    elif op == "mlp":
        made = [([x(), *weights((4 * C, C), (4 * C,), (C, 4 * C), (C,))], (), [x()])]
    elif op == "linear":  # before attention and after it
        made = [([x(), *weights((n, C), (n,))], (), [normal(B, T, n)]) for n in (3 * C, C)]
    else:
        targets = torch.randint(work.vocab_size, (B * T,), generator=generator, device=device)
        loss = torch.tensor(float(B * T), device=device)  # gradients of the sum: those of the mean underflow in fp16
        made = [([normal(B * T, C), *weights((work.V, C))], (targets, work.vocab_size), [loss])]
    return [Call([x.requires_grad_() for x in leaves], others, outputs) for leaves, others, outputs in made]


def run(fn: Callable, made: Sequence[Call], device: torch.device, precision: Precision) -> list[Tensor]:
    """Return the outputs and gradients of each call, in order."""
    results = []
    for call in made:
        with autocast(device, precision):
            outputs = fn(*call.leaves, *call.others)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, call.leaves, call.cotangents)
        results += [*(x.detach() for x in outputs), *(g.to_dense() for g in gradients)]  # sparse for embedding on a CPU
    return results


def implementation(op: str, name: str, work: Workload, device: torch.device) -> Callable:
    """Return the op's implementation as the run would use it: compiled if the step is."""
    config = OpsConfig(**{op: name})  # type: ignore[arg-type]  # names are Implementations
    fn = getattr(ops.build(config, device.type), op)
    return torch.compile(fn, dynamic=False) if work.compiled else fn


def measure_op(op: str, names: Sequence[str], work: Workload, device: torch.device) -> dict[str, Result]:
    """Verify, then time. An implementation that fails gets a reason instead of a time; torch's exceptions propagate."""
    functions, reasons = verify(op, names, work, device)
    made = calls(op, work, device, work.B)
    runs = {name: partial(run, fn, made, device, work.precision) for name, fn in functions.items()}
    for name in functions:  # the last compilations, and where a candidate may run out of memory
        reason = attempt(op, name, device, runs[name])[1]
        if reason:
            reasons[name] = reason
            del runs[name]
    times = time_ms(runs, device)
    return {name: reasons[name] if name in reasons else times[name] for name in names}


def verify(
    op: str, names: Sequence[str], work: Workload, device: torch.device
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Return the functions of correct candidates, and the reasons against the others. torch is first in `names`."""
    functions, reasons = {}, {}
    made, truth = exact_results(op, work, device)
    allowed: list[float] = []
    for name in names:
        fn, reason = attempt(op, name, device, partial(implementation, op, name, work, device))
        if not reason:
            got, reason = attempt(op, name, device, partial(run, fn, made, device, work.precision))
        if not reason:
            wrong = errors(got, truth)
            allowed = allowed or wrong
            reason = verdict(got, made, wrong, allowed, FLOORS[work.precision])
        if reason and name == "torch":
            raise RunError(f"torch's own {op} fails on {device_name(device)}: {reason}: try another version of torch")
        if reason:
            reasons[name] = reason
        else:
            functions[name] = fn
    return functions, reasons


def exact_results(op: str, work: Workload, device: torch.device) -> tuple[list[Call], list[Tensor]]:
    """Return calls and torch's results for them in fp32 without TF32; with fewer sequences if memory is short."""
    fn = getattr(ops.build(OpsConfig(), device.type), op)
    B, precision = work.B, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        while True:
            try:
                made = calls(op, work, device, B)
                return made, run(fn, [call.exact() for call in made], device, "fp32")
            except torch.OutOfMemoryError:
                if B == 1:
                    raise
            B //= 2
    finally:
        torch.set_float32_matmul_precision(precision)


def attempt(op: str, name: str, device: torch.device, call: Callable[[], Any]) -> tuple[Any, str]:
    """Return (call(), ""), or (None, why) if it raises; torch's exceptions propagate. RunError if the device broke."""
    try:
        done = call()
        synchronize(device)  # a kernel's error is raised late
        return done, ""
    except Exception as error:  # compilation, launch, memory: any error excludes this candidate
        if name == "torch":
            raise
        reason = describe_error(error)
    try:
        synchronize(device)
    except RuntimeError:
        raise RunError(f"{op} of {name} broke the device ({reason}): use --backend torch") from None
    return None, reason


def errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Return |got - truth| / |truth| of each; NaN if shapes differ or a value is not finite."""
    return [
        ((g.float() - t).norm() / t.norm().clamp(min=1e-20)).item() if g.shape == t.shape else math.nan
        for g, t in zip(got, truth)
    ]


def verdict(
    got: Sequence[Tensor],
    made: Sequence[Call],
    wrong: Sequence[float],
    allowed: Sequence[float],
    floor: float,
    whose: str = "torch's",
) -> str:
    """Return what is wrong with results of the errors `wrong`, "" if nothing; `allowed` are those of `whose`."""
    like = [x for call in made for x in (*call.cotangents, *call.leaves)]
    for i, (g, x, mine, theirs) in enumerate(zip(got, like, wrong, allowed)):
        if (g.shape, g.dtype) != (x.shape, x.dtype):
            return f"result {i} is {g.dtype} {tuple(g.shape)} and should be {x.dtype} {tuple(x.shape)}"
        if not mine <= TIMES_WORSE * theirs + floor:  # written so that NaN fails
            return f"result {i} is wrong by {mine:.1e}, {whose} by {theirs:.1e}"
    return ""


def time_ms(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return median milliseconds per call. The candidates take turns, so that clock drift affects all of them alike."""
    seconds = {name: sample_ms(call, 1, device) / 1e3 for name, call in runs.items()}
    repeats = {name: max(1, min(CALLS, int(SAMPLE_SECONDS / max(s, 1e-6)))) for name, s in seconds.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    while any(len(taken) < ROUNDS for taken in samples.values()) or time.perf_counter() < end:
        for name, call in runs.items():
            samples[name].append(sample_ms(call, repeats[name], device))
    return {name: median(taken) for name, taken in samples.items()}


def sample_ms(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return milliseconds per call, for `repeats` calls in a row; by the device's clock on CUDA."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - start) / repeats
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    for _ in range(repeats):
        call()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / repeats
