"""Weights rounded once a step: losses, norms and weights are those of autocast."""

import pytest
import torch

from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build
from gpt2fast.rounded import Rounded
from gpt2fast.training import optim
from gpt2fast.training.step import TrainingStep

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)
MATRICES = 2 * 4


def gpt(seed=1):
    return GPT(CONFIG, build(OpsConfig()), seed)


def batches(n):
    tokens = torch.randint(100, (n, 2, 17), generator=torch.Generator().manual_seed(0))
    return [(x[:, :-1], x[:, 1:]) for x in tokens]


def run(model, step, n=8):
    """Return losses, norms and weights after `n` micro-batches."""
    stream = iter(batches(n))
    done = [x.detach() for _ in range(n // step.accumulation) for x in step(stream, 1e-2)]
    return done + [w.detach() for w in model.parameters()]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_accumulated_steps_are_autocasts_bit_for_bit(precision):
    results = []
    for rounds in (True, False):
        model = gpt()
        step = TrainingStep(model, optim.adamw(model, 0.1), precision=precision, accumulation=2)
        assert len(step.rounded.copies) == MATRICES
        if not rounds:
            step.rounded, step.forward = None, model
        results.append(run(model, step))
    assert_equal(*results)


@pytest.mark.parametrize(
    ("precision", "accumulation"), [("fp32", 2), ("bf16", 1)], ids=["nothing to round", "nothing to gain"]
)
def test_there_are_no_copies_with(precision, accumulation):
    model = gpt()
    step = TrainingStep(model, optim.adamw(model, 0.1), precision=precision, accumulation=accumulation)
    assert step.rounded is None
    assert step.forward is model


def test_the_twin_shares_all_fp32_weights_but_the_matrices():
    model = gpt()
    rounded = Rounded(model, torch.bfloat16)
    ours, twins = dict(model.named_parameters()), dict(rounded.model.named_parameters())
    assert list(ours) == list(twins)
    copied = [name for name in ours if ours[name] is not twins[name]]
    assert len(copied) == len(rounded.copies) == MATRICES
    assert all(twins[name].dtype == torch.bfloat16 for name in copied)
    assert all(weight.dtype == torch.float32 for weight in ours.values())
    assert not any(name.startswith("w") for name in copied)


def test_weights_loaded_after_the_step_was_made_are_rounded_at_the_rehearsal():
    model, other = gpt(), gpt(seed=2)
    step = TrainingStep(model, optim.adamw(model, 0.1), precision="bf16", accumulation=2)
    model.load_state_dict(other.state_dict())
    (batch,) = batches(1)
    loss, _ = step.rehearse(batch)
    assert loss == TrainingStep(other, optim.adamw(other, 0.1), precision="bf16").rehearse(batch)[0]
    assert all(p.grad is None for p in (*model.parameters(), *step.rounded.model.parameters()))


def with_copies():
    """Return a model and a step whose optimizer reads and writes the copies, as in a compiled step, but uncompiled."""
    model = gpt()
    step = TrainingStep(model, optim.adamw(model, 0.1), precision="bf16", grad_clip=0.5)
    step.copies, step.rounded = "written", Rounded(model, torch.bfloat16, keep_gradients=True)
    step.optimizer.copies = dict(step.rounded.copies)
    step.forward = step.rounded.model
    return model, step


def test_adamw_that_writes_the_copies_is_torchs():
    """Weights and moments agree after a step, and so do the losses of four more, where copies may round differently.

    Norms are not compared: on a CPU with other bf16 instructions they differ by 1.4e-3, a third of bf16's precision.
    """
    (model, step), plain = with_copies(), gpt()
    other = TrainingStep(plain, optim.adamw(plain, 0.1), precision="bf16", grad_clip=0.5)
    got, expected = run(model, step, 1), run(plain, other, 1)
    assert expected[1] > 1  # clipped
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    for weight, copy in step.rounded.copies.items():
        assert torch.equal(copy, weight.bfloat16())
        assert copy.grad is None
    ours, theirs = (s.optimizer.state_dict()["state"] for s in (step, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    got, expected = run(model, step, 4), run(plain, other, 4)
    torch.testing.assert_close(got[:8:2], expected[:8:2], rtol=1e-3, atol=0)


def test_updates_equal_adamws_formula():
    """The formula in fp64 is the truth, from which the pass differs by fp32's rounding."""
    _, step = with_copies()
    (weight, copy), *_ = step.rounded.copies.items()
    before, gradient = weight.detach().double(), torch.randn(weight.shape).bfloat16()
    step.optimizer.copies = {weight: copy}
    for group in step.optimizer.param_groups:
        group["lr"] = 0.1
    m = v = 0
    for i in (1, 2):
        copy.grad = gradient.clone()
        step.optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        before = before * (1 - 0.1 * 0.1) - 0.1 * m / (1 - 0.9**i) / ((v / (1 - 0.95**i)).sqrt() + optim.EPS)
    torch.testing.assert_close(weight.detach().double(), before, rtol=1e-5, atol=1e-6)


def test_a_rehearsal_leaves_no_gradient_in_the_copies():
    model, step = with_copies()
    before = [w.detach().clone() for w in model.parameters()]
    step.rehearse(batches(1)[0])
    assert all(p.grad is None for p in step.rounded.model.parameters())
    assert_equal(list(model.parameters()), before)


def test_a_compiled_step_writes_the_copies_and_torchs_adamw_resumes_from_its_checkpoint(tmp_path):
    from gpt2fast.weights import checkpoint

    model = gpt()
    step = TrainingStep(model, optim.adamw(model, 0.1), precision="bf16", compile=True)
    assert len(step.optimizer.copies) == MATRICES
    run(model, step, 3)
    state = {"position": 3}
    path = checkpoint.save(tmp_path, 3, model, step.optimizer, state, keep=1)
    other = gpt(seed=2)
    plain = TrainingStep(other, optim.adamw(other, 0.1), precision="bf16")
    checkpoint.load_training(path, other, plain.optimizer, checkpoint.read_state(path))
    torch.testing.assert_close(run(model, step, 2)[:4], run(other, plain, 2)[:4], rtol=1e-3, atol=1e-3)
