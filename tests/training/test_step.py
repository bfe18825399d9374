"""A step: skipped bit for bit by every optimizer if a gradient is not finite; accumulation, clipping, loss scaling."""

from functools import partial

import pytest
import torch
from torch import nn

from gpt2fast import kernels, ops
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build
from gpt2fast.training import optim
from gpt2fast.training.graph import UNRECORDED, GraphedStep
from gpt2fast.training.step import TrainingStep
from tests.tools import tiny
from tests.tools.recording import played_by_hand

pytestmark = pytest.mark.kernel

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=100)
MAKERS = {
    "torch, fused": partial(optim.adamw),
    "torch, not fused": partial(optim.adamw, fused=False),
    "triton": partial(optim.adamw, kernels=kernels),
}
BAD = [float("nan"), float("inf"), float("-inf")]


def snapshot(step: TrainingStep) -> list[torch.Tensor]:
    """Return weights, rounded copies, moments and step counts."""
    copies = [*step.rounded.copies.values()] if step.rounded else []
    states = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
    return [tensor.detach().clone() for tensor in (*step.model.parameters(), *copies, *states)]


def spoiled(model: GPT, value: float) -> torch.utils.hooks.RemovableHandle:
    """Set one number of one weight's gradient to `value` from now on."""

    def spoil(weight: nn.Parameter) -> None:
        weight.grad.view(-1)[-1] = value

    return model.wpe.weight.register_post_accumulate_grad_hook(spoil)


def batches(n: int, device):
    tokens = torch.randint(100, (n, 2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    return [(rows[:, :-1], rows[:, 1:]) for rows in tokens]


@pytest.mark.parametrize("clip", [0.5, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("bf16", 1), ("bf16", 2)])
def test_weights_moments_and_step_counts_stay_bit_for_bit(name, precision, accumulation, clip, device):
    """The steps around it give the bits of a run without the bad step."""
    runs = []
    for bad in (True, False):
        model = GPT(CONFIG, ops.build(OpsConfig(), device.type)).to(device)
        step = TrainingStep(
            model, MAKERS[name](model, 0.1), precision=precision, accumulation=accumulation, grad_clip=clip
        )
        given = batches(4 * accumulation, device)
        for i, value in enumerate([None, *BAD, None] if bad else [None, None]):
            part = given[:accumulation] if i == 0 else given[accumulation:]
            if value is None:
                step(iter(part), 1e-3)
                continue
            handle, before = spoiled(model, value), snapshot(step)
            _, norm = step(iter(part), 1e-3)
            handle.remove()
            assert not norm.isfinite()
            assert all(map(torch.equal, snapshot(step), before))
            assert all(p.grad is None for p in model.parameters())
        runs.append(snapshot(step))
    assert all(map(torch.equal, *runs))
    assert {state["step"].item() for state in step.optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("value", BAD)
def test_bad_gradients_of_copies_on_a_cpu_are_skipped(value, monkeypatch):
    """The compiled pass is replaced by the function that it compiles, which saves seconds."""
    monkeypatch.setattr(optim, "_compile", lambda fn: fn)
    weight = nn.Parameter(torch.randn(6, 4))
    copy = nn.Parameter(weight.detach().bfloat16())
    optimizer = optim.AdamW([weight], lr=1e-2, fused=True)
    optimizer.copies = {weight: copy}
    for number, good in enumerate((True, False, True)):
        before = weight.detach().clone()
        copy.grad = torch.ones_like(copy)
        if not good:
            copy.grad[0, 0] = value
        optim.clip_and_step(optimizer, 1.0)
        assert torch.equal(weight, before) == (not good)
        assert torch.equal(copy, weight.bfloat16())
        assert optimizer.state[weight]["step"] == max(1, number)


def test_a_recorded_step_is_skipped_too(device, monkeypatch):
    from gpt2fast.training import graph

    made = []
    if device.type != "cuda":
        monkeypatch.setattr(graph, "record_graph", played_by_hand(made))
    model = GPT(CONFIG, ops.build(OpsConfig(), device.type)).to(device)
    step = GraphedStep(model, MAKERS["triton"](model, 0.1), precision="bf16", grad_clip=0.5)
    made.append(step)
    given = iter(batches(UNRECORDED + 3, device))
    for _ in range(UNRECORDED + 1):
        step(given, 1e-3)
    before = snapshot(step)
    update = step._graphs["update"]  # replayed with a gradient that is spoiled after the recorded backward
    original = update.replay

    def replay():
        model.wpe.weight.grad.view(-1)[0] = float("nan")
        original()

    step._graphs["update"] = type("Spoiled", (), {"replay": staticmethod(replay)})()
    _, norm = step(given, 1e-3)
    assert norm.isnan()
    assert all(map(torch.equal, snapshot(step), before))
    step._graphs["update"] = update
    step(given, 1e-3)
    assert {state["step"].item() for state in step.optimizer.state.values()} == {UNRECORDED + 2.0}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch, fused", "triton"])
def test_the_host_does_not_wait_for_the_device(name, device):
    model = GPT(CONFIG, ops.build(OpsConfig(), device.type)).to(device)
    step = TrainingStep(model, MAKERS[name](model, 0.1), precision="bf16", grad_clip=0.5)
    given = batches(3, device)
    step(iter(given[:1]), 1e-3)
    torch.cuda.synchronize()
    spoiled(model, float("nan"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(iter(given[1:2]), 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random_batches(n, B, T=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (n, B, T), generator=generator)
    return [(x, x.roll(-1, 1)) for x in tokens]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Four micro-batches of one sequence give the step of one batch of four, up to the order of summation."""
    whole = random_batches(1, 4)
    parts = [(x[None], y[None]) for x, y in zip(*whole[0])]
    results = []
    for stream, accumulation in ((whole, 1), (parts, 4)):
        model = GPT(tiny.MODEL, build(OpsConfig()))
        step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32", accumulation=accumulation, grad_clip=1.0)
        loss, norm = step(iter(stream), lr=1e-3)
        results.append([loss, norm, *model.state_dict().values()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_gradients_are_clipped_and_the_norm_before_is_returned():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    seen = []
    optimizer = optim.adamw(model, 0.0)
    optimizer.register_step_post_hook(lambda *_: seen.append([p.grad.clone() for p in model.parameters()]))
    step = TrainingStep(model, optimizer, precision="fp32", grad_clip=0.01)
    _, norm = step(iter(random_batches(1, 2)), lr=1e-3)
    assert norm > 0.02
    clipped = torch.stack([g.norm() for g in seen[0]]).norm()
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())  # set_to_none


def test_giving_up_within_a_step_changes_nothing():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32", accumulation=3)
    answers = iter([False, False, True])
    assert step(iter(random_batches(3, 2)), lr=1.0, give_up=lambda: next(answers)) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_fp16_scales_the_loss_and_skips_overflows():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp16")
    assert step.scaler.is_enabled()
    assert not TrainingStep(model, step.optimizer, precision="bf16").scaler.is_enabled()
    (batch,) = random_batches(1, 2)
    losses = [step(iter([batch]), lr=1e-2)[0].item() for _ in range(30)]
    assert losses[-1] < losses[0] - 2
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # at which every fp16 gradient overflows
    before = model.wte.weight.clone()
    loss, norm = step(iter([batch]), lr=1e-2)
    assert loss.isfinite()
    assert not norm.isfinite()
    assert torch.equal(model.wte.weight, before)
    assert step.scaler.get_scale() == 2.0**59
