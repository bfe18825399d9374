"""GPT-2's shape, initial weights, padding and limits."""

import math
from dataclasses import replace

import pytest
import torch

from gpt2fast import ops
from gpt2fast.errors import UserError
from gpt2fast.machine.device import autocast
from gpt2fast.model import GPT, SIZES, GPTConfig, parameter_count
from gpt2fast.training import flops, optim
from gpt2fast.training.step import TrainingStep, compile_model

OPS = ops.build(ops.OpsConfig())
TINY = GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=70)  # padded to 128


def tokens(*shape: int, vocab_size: int = TINY.vocab_size, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_sizes_have_the_published_parameter_counts(size, count):
    with torch.device("meta"):
        model = GPT(SIZES[size], OPS)
    assert parameter_count(model) == flops.parameters(SIZES[size]) == count


def test_heads_are_64_wide_in_all_published_sizes():
    assert {c.n_embd // c.n_head for name, c in SIZES.items() if name != "nano"} == {64}


def test_the_head_is_the_token_embedding():
    model = GPT(TINY, OPS)
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes.count((128, 24)) == 1
    h = torch.randn(3, 24)
    before = model.logits(h)
    with torch.no_grad():
        model.wte.weight[5] += 1
    changed = (model.logits(h) != before).any(0)
    assert changed.nonzero().tolist() == [[5]]


def test_initial_weights_are_gpt2s():
    config = SIZES["nano"]
    for name, weight in GPT(config, OPS).named_parameters():
        if weight.dim() == 2:
            weight = weight[: config.vocab_size]
            std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
            n = weight.numel()
            assert weight.mean().item() == pytest.approx(0, abs=5 * std / n**0.5), name
            assert weight.std().item() == pytest.approx(std, abs=5 * std / (2 * n) ** 0.5), name
        else:
            assert torch.all(weight == (1 if name.endswith("weight") else 0)), name


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one, other = GPT(TINY, OPS, seed=3).state_dict(), GPT(TINY, OPS, seed=4).state_dict()
    torch.manual_seed(2)
    again = GPT(TINY, OPS, seed=3).state_dict()
    for name, weight in one.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, other[name]) == (weight.dim() == 1), name


def test_initial_weights_do_not_depend_on_the_padding(monkeypatch):
    padded = GPT(TINY, OPS).state_dict()
    monkeypatch.setattr(GPTConfig, "padded_vocab_size", property(lambda config: config.vocab_size))
    plain = GPT(TINY, OPS).state_dict()
    assert [name for name, weight in padded.items() if not torch.equal(weight, plain[name])] == []


def test_drawing_initial_weights_leaves_torchs_own_generator_alone():
    before = torch.get_rng_state()
    GPT(TINY, OPS)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_layer_norm_has_gpt2s_eps():
    seen = []

    def layer_norm(x, w, b, eps):
        seen.append(eps)
        return OPS.layer_norm(x, w, b, eps)

    def add_layer_norm(x, y, w, b, eps):
        seen.append(eps)
        return OPS.add_layer_norm(x, y, w, b, eps)

    GPT(TINY, replace(OPS, layer_norm=layer_norm, add_layer_norm=add_layer_norm))(tokens(1, 3))
    assert seen == [1e-5] * (2 * TINY.n_layer + 1)


def test_state_dict_has_no_padding_and_round_trips():
    model, other = GPT(TINY, OPS, seed=1), GPT(TINY, OPS, seed=2)
    state = model.state_dict()
    assert state["wte.weight"].shape == (70, 24)
    assert "lm_head.weight" not in state
    other.load_state_dict(state)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p, q), name
    assert other.wte.weight.shape == (128, 24)


def test_a_vocabulary_that_needs_no_padding_round_trips():
    config = replace(TINY, vocab_size=128)
    model, other = GPT(config, OPS, seed=1), GPT(config, OPS, seed=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.wte.weight, other.wte.weight)


@pytest.mark.parametrize("rows", [69, 71, 127], ids=str)
def test_a_vocabulary_of_another_size_is_refused(rows):
    model = GPT(TINY, OPS)
    state = model.state_dict() | {"wte.weight": torch.zeros(rows, 24)}
    with pytest.raises(RuntimeError, match=r"size mismatch for wte.weight"):
        model.load_state_dict(state)


def test_logits_are_as_wide_as_the_vocabulary():
    assert GPT(TINY, OPS)(tokens(2, 5)).shape == (2, 5, 70)


def test_the_loss_is_the_cross_entropy_of_the_logits_and_so_are_its_gradients():
    model, idx, targets = GPT(TINY, OPS), tokens(2, 5), tokens(2, 5, seed=1)
    losses = model(idx, targets), -model(idx).log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses))


def test_padded_rows_stay_zero_through_training():
    model = GPT(TINY, OPS)
    optimizer = optim.adamw(model, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    before = model.wte.weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        model(tokens(4, 8, seed=step), tokens(4, 8, seed=step + 10)).backward()
        assert model.wte.weight.grad[70:].abs().max() == 0
        optimizer.step()
    assert model.wte.weight[70:].abs().max() == 0
    assert (model.wte.weight[:70] != before[:70]).all()


@pytest.mark.parametrize("t", [1, 8, 15])
def test_a_later_token_changes_no_earlier_logit(t):
    model, idx = GPT(TINY, OPS), tokens(2, 16)
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 70
    logits, logits_changed = model(idx), model(changed)
    assert torch.equal(logits[:, :t], logits_changed[:, :t])
    assert (logits[:, t:] != logits_changed[:, t:]).any(-1).all()


def test_positions_are_learned_for_block_size_tokens_and_no_more():
    model = GPT(TINY, OPS)
    assert model(tokens(1, 16)).shape == (1, 16, 70)
    with pytest.raises(UserError, match="17 positions are more than block_size 16"):
        model(tokens(1, 17))


def test_the_same_token_elsewhere_has_other_logits():
    logits = GPT(TINY, OPS)(torch.full((1, 2), 7))
    assert not torch.equal(logits[0, 0], logits[0, 1])


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block_size", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1], ids=str)
def test_a_shape_below_one_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}: it must be at least 1"):
        GPTConfig(**{name: value})


def test_heads_of_unequal_width_are_refused():
    with pytest.raises(UserError, match="n_embd 100 is no multiple of n_head 12"):
        GPTConfig(n_embd=100)


def old_hidden(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """As it was written before embedding, residual and recompute."""
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
def test_without_options_nothing_has_changed_by_a_bit(precision):
    model = GPT(TINY, OPS)
    for got, expected in zip(*(loss_and_gradients(model, precision, hidden) for hidden in (None, old_hidden))):
        assert torch.equal(got, expected)


STREAMS = {
    ("fp32", "fp32"): torch.float32, ("fp32", "low"): torch.float32, ("bf16", "fp32"): torch.float32,
    ("bf16", "low"): torch.bfloat16, ("fp16", "low"): torch.float16,
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("precision", "residual"), STREAMS)
def test_the_streams_dtype(precision, residual, recompute):
    """Of every sum, and of the gradients, which a hook of autograd sees."""
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
    # computed again until the last value that backward needs, which is in the second one of a block
    assert len(seen) == TINY.n_layer * (2 + recompute)
    assert set(gradients) == {dtype}
    assert loss.dtype == torch.float32


def test_a_low_stream_has_gradients_of_the_weights_dtype_and_moves_the_loss_by_its_rounding():
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


def test_nothing_is_recomputed_where_nothing_is_differentiated():
    calls = []
    attention = replace(OPS, attention=lambda *args: calls.append(torch.is_grad_enabled()) or OPS.attention(*args))
    with torch.no_grad():
        logits = GPT(TINY, attention, recompute=True)(tokens(1, 5))
    assert calls == [False] * TINY.n_layer
    assert torch.equal(logits, GPT(TINY, OPS)(tokens(1, 5)))


def test_recomputed_blocks_keep_their_inputs_only():
    def kept(recompute: bool) -> int:
        """Bytes that the loss holds on to, beside the parameters."""
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
def test_weights_rounded_once_a_step_go_with_both_options(residual):
    """As test_rounded.py has it: the twin's options are the model's, and its steps are autocast's bit for bit."""
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
    """Block by block as on a CPU: the same bits. As one graph, as on a GPU: torch.compile fuses otherwise."""
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


def test_an_untrained_model_guesses_uniformly():
    model = GPT(SIZES["nano"], OPS)
    idx, targets = (tokens(2, 64, vocab_size=50257, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        assert model(idx, targets).item() == pytest.approx(math.log(50257), abs=0.1)
