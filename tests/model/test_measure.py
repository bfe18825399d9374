"""The candidates for an op: wrong ones are refused, and the others are timed in turns."""

import math
from dataclasses import replace

import pytest
import torch

from gpt2fast import measure, reference
from gpt2fast.auto import fastest
from gpt2fast.errors import RunError
from gpt2fast.machine.device import autocast
from gpt2fast.measure import Workload
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import NAMES, Ops, OpsConfig, build
from tests.tools.clock import Clock

CPU = torch.device("cpu")
WORK = Workload(B=2, T=8, C=32, H=2, V=64, vocab_size=50, precision="fp32", tf32=False, compiled=False)


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.01)


def plant(monkeypatch, **functions):
    """Make these functions the implementations of any op, and leave the others unchanged."""
    real = measure.implementation
    monkeypatch.setattr(measure, "implementation", lambda op, name, *rest: functions.get(name) or real(op, name, *rest))


@pytest.mark.parametrize("residual", ["fp32", "low"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", NAMES)
def test_torch_agrees_with_itself_and_is_timed(op, precision, residual, monkeypatch, briefly):
    plant(monkeypatch, compiled=getattr(build(OpsConfig()), op))
    before = torch.get_rng_state()
    work = replace(WORK, precision=precision, residual=precision if residual == "low" else "fp32")
    times = measure.measure_op(op, ["torch", "compiled"], work, CPU)
    assert set(times) == {"torch", "compiled"}
    assert all(isinstance(ms, float) and 0 < ms < math.inf for ms in times.values())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("residual", ["fp32", "low"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("op", NAMES)
def test_the_inputs_are_those_of_training(op, precision, residual):
    """Shapes, dtypes and requires_grad are those with which the model calls the op."""
    seen = set()
    functions = {name: getattr(reference, name) for name in (*NAMES, "cached_attention")}
    fn = functions[op]

    def spy(*args):
        seen.add(tuple(map(described, args)))
        return fn(*args)

    sizes = GPTConfig(n_layer=2, n_head=WORK.H, n_embd=WORK.C, block_size=WORK.T, vocab_size=WORK.vocab_size)
    gpt = GPT(sizes, Ops(**functions | {op: spy}), residual=residual)
    tokens = torch.zeros(WORK.B, WORK.T, dtype=torch.long)
    with autocast(CPU, precision):
        gpt(tokens, tokens).backward()
    made = measure.calls(
        op, replace(WORK, precision=precision, residual=precision if residual == "low" else "fp32"), CPU, WORK.B
    )
    assert {tuple(map(described, (*call.leaves, *call.others))) for call in made} == seen


def described(x):
    return (tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else x


WRONG = {
    "output": lambda x, w, b: reference.linear(x, w, b) * 1.01,
    "gradient": lambda x, w, b: reference.linear(x, w, (b + b.detach()) / 2),
    "NaN": lambda x, w, b: reference.linear(x, w, b) * math.nan,
    "dtype": lambda x, w, b: reference.linear(x, w, b).double(),
    "shape": lambda x, w, b: reference.linear(x, w, b)[:1],
    "number": lambda x, w, b: (reference.linear(x, w, b), x + 0),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_results_are_refused(fault, precision, monkeypatch, briefly):
    plant(monkeypatch, triton=WRONG[fault])
    found = measure.measure_op("linear", ["torch", "triton"], replace(WORK, precision=precision), CPU)
    assert isinstance(found["torch"], float)
    assert isinstance(found["triton"], str)
    if fault in ("output", "gradient"):
        assert "is wrong by" in found["triton"]


def test_the_faster_candidate_is_chosen(monkeypatch, briefly):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)

    def sleeping(x, w, b):
        clock.sleep(0.005)
        return reference.linear(x, w, b)

    plant(monkeypatch, compiled=sleeping)
    times = measure.measure_op("linear", ["torch", "compiled"], WORK, CPU)
    assert times["compiled"] > 9  # linear is called with two shapes
    assert fastest(times) == "torch"
    plant(monkeypatch, torch=sleeping, compiled=reference.linear)
    assert fastest(measure.measure_op("linear", ["torch", "compiled"], WORK, CPU)) == "compiled"


def test_a_candidate_that_fails_only_while_it_is_timed_is_not_used(monkeypatch, briefly):
    count = []

    def second_time(x, w, b):
        count.append(1)
        if len(count) > 2:
            raise torch.OutOfMemoryError("no memory")
        return reference.linear(x, w, b)

    plant(monkeypatch, triton=second_time)
    found = measure.measure_op("linear", ["torch", "triton"], WORK, CPU)
    assert found["triton"] == "OutOfMemoryError: no memory"
    assert isinstance(found["torch"], float)


def test_exceptions_of_torchs_own_ops_propagate(monkeypatch):
    def raising(*_):
        raise torch.OutOfMemoryError("no memory")

    plant(monkeypatch, torch=raising)
    with pytest.raises(torch.OutOfMemoryError):
        measure.measure_op("mlp", ["torch", "compiled"], WORK, CPU)
    plant(monkeypatch, torch=lambda x, w, b: reference.linear(x, w, b) * math.nan)
    with pytest.raises(RunError, match="torch's own linear fails on .*: result 0 is wrong by nan"):
        measure.measure_op("linear", ["torch", "compiled"], WORK, CPU)


def test_a_candidate_that_breaks_the_device_ends_the_run_in_one_line(monkeypatch):
    def broken(_):
        raise RuntimeError("an illegal memory access was encountered")

    def candidate():
        monkeypatch.setattr(measure, "synchronize", broken)

    with pytest.raises(RunError, match=r"mlp of triton broke the device \(RuntimeError: an illegal.*--backend torch"):
        measure.attempt("mlp", "triton", CPU, candidate)


def test_fewer_sequences_are_verified_if_memory_is_short(monkeypatch):
    real = measure.run

    def run(fn, made, *rest):
        if len(made[0].leaves[0]) > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(fn, made, *rest)

    monkeypatch.setattr(measure, "run", run)
    made, truth = measure.exact_results("mlp", replace(WORK, B=4), CPU)
    assert len(made[0].leaves[0]) == len(truth[0]) == 1
    with pytest.raises(torch.OutOfMemoryError):
        measure.exact_results("linear_cross_entropy", WORK, CPU)


def test_the_truth_is_exact_fp32_whatever_the_runs_precision(monkeypatch):
    seen, real = [], measure.run
    monkeypatch.setattr(measure, "run", lambda *args: seen.append(torch.get_float32_matmul_precision()) or real(*args))
    torch.set_float32_matmul_precision("high")
    try:
        _, truth = measure.exact_results("mlp", replace(WORK, precision="bf16"), CPU)
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "high")
        assert {x.dtype for x in truth} == {torch.float32}
    finally:
        torch.set_float32_matmul_precision("highest")


def test_candidates_take_turns(briefly, monkeypatch):
    order, clock = [], Clock()
    monkeypatch.setattr(measure, "time", clock)
    measure.time_ms({name: lambda name=name: order.append(name) or clock.sleep(0.006) for name in "ab"}, CPU)
    assert order[:12] == ["a", "b"] * 6


@pytest.mark.long
def test_torch_compile_is_measured_without_stand_ins(briefly):
    compiled = measure.measure_op("layer_norm", ["torch", "compiled"], WORK, CPU)
    in_a_compiled_step = measure.measure_op("layer_norm", ["torch"], replace(WORK, compiled=True), CPU)
    for found in (*compiled.values(), *in_a_compiled_step.values()):
        assert isinstance(found, float), found
