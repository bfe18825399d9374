"""GPT-2's shape, initial weights, padding and limits. Residual streams and recomputing are in test_model_options.py."""

import math
from dataclasses import replace

import pytest
import torch

from gpt2fast import ops
from gpt2fast.errors import UserError
from gpt2fast.model import GPT, SIZES, GPTConfig, parameter_count
from gpt2fast.training import flops, optim

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


def test_initial_weights_depend_on_the_seed_only():
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


def test_drawing_initial_weights_does_not_touch_torchs_generator():
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


def test_the_loss_and_its_gradients_are_those_of_cross_entropy_of_the_logits():
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
def test_a_later_token_does_not_change_earlier_logits(t):
    model, idx = GPT(TINY, OPS), tokens(2, 16)
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 70
    logits, logits_changed = model(idx), model(changed)
    assert torch.equal(logits[:, :t], logits_changed[:, :t])
    assert (logits[:, t:] != logits_changed[:, t:]).any(-1).all()


def test_a_sequence_may_have_block_size_tokens_and_no_more():
    model = GPT(TINY, OPS)
    assert model(tokens(1, 16)).shape == (1, 16, 70)
    with pytest.raises(UserError, match="a sequence of 17 tokens is longer than block_size 16: shorten it"):
        model(tokens(1, 17))


def test_the_same_token_at_another_position_has_other_logits():
    logits = GPT(TINY, OPS)(torch.full((1, 2), 7))
    assert not torch.equal(logits[0, 0], logits[0, 1])


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block_size", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1], ids=str)
def test_a_shape_below_one_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}: it must be at least 1"):
        GPTConfig(**{name: value})


def test_heads_of_unequal_width_are_refused():
    with pytest.raises(UserError, match="n_embd 100 is not a multiple of n_head 12"):
        GPTConfig(n_embd=100)


def test_an_untrained_model_guesses_uniformly():
    model = GPT(SIZES["nano"], OPS)
    idx, targets = (tokens(2, 64, vocab_size=50257, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        assert model(idx, targets).item() == pytest.approx(math.log(50257), abs=0.1)
