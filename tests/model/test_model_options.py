"""GPT's options: the dtype of the residual stream, and blocks that are recomputed in backward."""

from dataclasses import replace

import pytest
import torch

from gpt2fast import ops
from gpt2fast.machine.device import autocast
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.training import optim
from gpt2fast.training.step import TrainingStep, compile_model

OPS = ops.build(ops.OpsConfig())
TINY = GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=70)  # padded to 128


def tokens(*shape: int, vocab_size: int = TINY.vocab_size, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def plain_hidden(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """GPT.hidden written as a plain loop, without residual, recompute and attends."""
    sparse = idx.device.type == "cpu"
    x = torch.nn.functional.embedding(idx, model.wte.weight, sparse=sparse) + model.wpe.weight[: idx.shape[1]]
    norms = [block.ln_1 for block in model.h] + [model.ln_f]
    h = model.ops.layer_norm(x, norms[0].weight, norms[0].bias, 1e-5)
    for block, next_ln in zip(model.h, norms[1:]):
        x, h = block(x, h, next_ln)
    return h


def loss_and_gradients(model: GPT, precision: str, hidden=None) -> list[torch.Tensor]:
    idx, targets = tokens(3, 9), tokens(3, 9, seed=1)
    with autocast(torch.device("cpu"), precision):
        h = (hidden or GPT.hidden)(model, idx).flatten(0, 1)
        loss = model.ops.linear_cross_entropy(h, model.wte.weight, targets.flatten(), 70)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_options_the_model_is_the_plain_loop_bit_for_bit(precision):
    model = GPT(TINY, OPS)
    for got, expected in zip(*(loss_and_gradients(model, precision, hidden) for hidden in (None, plain_hidden))):
        assert torch.equal(got, expected)


STREAMS = {
    ("fp32", "fp32"): torch.float32, ("fp32", "low"): torch.float32, ("bf16", "fp32"): torch.float32,
    ("bf16", "low"): torch.bfloat16, ("fp16", "low"): torch.float16,
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("precision", "residual"), STREAMS)
def test_the_dtype_of_the_residual_stream(precision, residual, recompute):
    """Of every sum, and of its gradient, which an autograd hook receives."""
    seen, gradients = [], []

    def add_layer_norm(x, y, w, b, eps):
        s, h = OPS.add_layer_norm(x, y, w, b, eps)
        seen.append((x.dtype, s.dtype))
        s.register_hook(lambda ds: gradients.append(ds.dtype)) if s.requires_grad else None
        return s, h

    model = GPT(TINY, replace(OPS, add_layer_norm=add_layer_norm), residual=residual, recompute=recompute)
    loss, *_ = loss_and_gradients(model, precision)
    dtype = STREAMS[precision, residual]
    assert set(seen) == {(dtype, dtype)}
    # recomputation stops at the last value that backward needs, which the second sum of a block computes
    assert len(seen) == TINY.n_layer * (2 + recompute)
    assert set(gradients) == {dtype}
    assert loss.dtype == torch.float32


def test_a_low_residual_stream_changes_the_loss_by_its_rounding_and_no_gradients_dtype():
    low, fp32 = (loss_and_gradients(GPT(TINY, OPS, residual=low), "bf16") for low in ("low", "fp32"))
    assert {g.dtype for g in low} == {torch.float32}
    assert not torch.equal(low[0], fp32[0])
    torch.testing.assert_close(low[0], fp32[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("residual", ["fp32", "low"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_blocks_have_the_same_loss_and_gradients_bit_for_bit(precision, residual):
    calls = []
    attention = replace(OPS, attention=lambda *args: calls.append(1) or OPS.attention(*args))
    results = [
        loss_and_gradients(GPT(TINY, attention, residual=residual, recompute=recompute), precision)
        for recompute in (False, True)
    ]
    assert len(calls) == 3 * TINY.n_layer  # the second time, forward and backward
    for got, expected in zip(*results):
        assert torch.equal(got, expected)


def test_nothing_is_recomputed_without_gradients():
    calls = []
    attention = replace(OPS, attention=lambda *args: calls.append(torch.is_grad_enabled()) or OPS.attention(*args))
    with torch.no_grad():
        logits = GPT(TINY, attention, recompute=True)(tokens(1, 5))
    assert calls == [False] * TINY.n_layer
    assert torch.equal(logits, GPT(TINY, OPS)(tokens(1, 5)))


def test_recomputed_blocks_save_their_inputs_only():
    def kept(recompute: bool) -> int:
        """Return the bytes that the loss's graph keeps, without the parameters."""
        model = GPT(replace(TINY, n_layer=6), OPS, recompute=recompute)
        parameters = {p.data_ptr() for p in model.parameters()}
        saved = {}

        def pack(x):
            if x.untyped_storage().data_ptr() not in parameters:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        idx = tokens(4, 16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(idx, idx)
        assert loss.requires_grad
        return sum(saved.values())

    assert kept(True) < 0.4 * kept(False)


@pytest.mark.parametrize("residual", ["fp32", "low"])
def test_weights_rounded_once_a_step_work_with_both_options(residual):
    """As in test_rounded.py: the twin's options are the model's, and its steps are autocast's bit for bit."""
    results = []
    for recompute, rounds in ((True, True), (False, False)):
        model = GPT(TINY, OPS, residual=residual, recompute=recompute)
        step = TrainingStep(model, optim.adamw(model, 0.1), precision="bf16", accumulation=2)
        assert (step.rounded.model.residual, step.rounded.model.recompute) == (residual, recompute)
        if not rounds:
            step.rounded, step.forward = None, model
        batches = iter([(tokens(2, 9, seed=seed), tokens(2, 9, seed=seed + 9)) for seed in range(6)])
        results.append([x.detach() for _ in range(3) for x in step(batches, 1e-2)] + list(model.parameters()))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)


@pytest.mark.long
@pytest.mark.parametrize("whole", [False, True], ids=["block by block", "whole"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_and_recomputed(precision, whole):
    """Block by block, as on a CPU, results are equal bit for bit. As one graph, as on a GPU, torch.compile fuses
    differently."""
    torch._dynamo.reset()
    results = []
    for recompute in (False, True):
        model = GPT(TINY, OPS, recompute=recompute)
        forward = torch.compile(model, fullgraph=True) if whole else compile_model(model, torch.device("cpu"))
        with autocast(torch.device("cpu"), precision):
            loss = forward(tokens(3, 9), tokens(3, 9, seed=1))
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    if whole:
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(*results, **tolerance)
    else:
        assert all(map(torch.equal, *results))
