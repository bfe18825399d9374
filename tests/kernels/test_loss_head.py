"""The head and the loss in one: linear_cross_entropy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gpt2fast import reference
from gpt2fast.kernels import launch, linear_cross_entropy
from tests.tools.accuracy import Results, assert_kernel_is_as_accurate, outputs_and_gradients
from tests.tools.inputs import DTYPES, normal, targets_of

pytestmark = pytest.mark.kernel
# A row's share of the gradient is 1 / N: with 512 rows, fp16 loses it if it is not scaled in time
ROWS_SCALED = [64, pytest.param(512, marks=pytest.mark.long)]


def honest_head(inputs, cotangents, targets, vocab_size):
    """The head in torch: matmuls at the dtype, the loss in fp32, dlogits rounded to the dtype."""
    x, w = inputs
    logits = (x @ w.t()).float()[:, :vocab_size].requires_grad_()
    loss = F.cross_entropy(logits, targets)
    count = (targets != -100).sum()
    (dlogits,) = torch.autograd.grad(loss, logits)
    # scaled later, as in the kernel
    dlogits = F.pad(dlogits * count, (0, w.shape[0] - vocab_size)).to(x.dtype)
    scale = cotangents[0] / count
    # scaled in fp32: torch would first round a 0-d scale to the dtype, an error of 2^-9 in every element
    dx, dw = ((m.float() * scale).to(x.dtype) for m in (dlogits @ w, (dlogits.t().float() @ x.float()).to(x.dtype)))
    return Results([loss.detach()], [dx.to(x.dtype), dw.to(x.dtype)], list(cotangents))


def check_head(x, w, targets, vocab_size):
    flags = {"targets": targets, "vocab_size": vocab_size}
    kernel, judge, base = (
        partial(fn, **flags) for fn in (linear_cross_entropy, reference.linear_cross_entropy, honest_head)
    )
    assert_kernel_is_as_accurate(kernel, judge, [x, w], base=base)
    assert (outputs_and_gradients(kernel, [x, w]).gradients[1][vocab_size:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "C", "V", "padding"),
    [(64, 32, 320, 17), (5, 16, 64, 0), (1, 8, 40, 3), pytest.param(300, 24, 128, 1, marks=pytest.mark.long)],
)
def test_linear_cross_entropy(N, C, V, padding, dtype, device):
    x, w = normal(N, C, dtype=DTYPES[dtype], device=device), normal(V, C, dtype=DTYPES[dtype], device=device, seed=1)
    check_head(x, w, targets_of(N, V - padding, device), V - padding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_nothing_but_memory(dtype, device, monkeypatch):
    monkeypatch.setattr(launch, "head_rows", lambda *_: 20)  # 70 rows: four chunks, the last one short
    x, w = normal(70, 24, dtype=DTYPES[dtype], device=device), normal(128, 24, dtype=DTYPES[dtype], device=device)
    check_head(x, w, targets_of(70, 120, device), 120)


@pytest.mark.gpu
@pytest.mark.parametrize("C", [768, 1600])
def test_sizes_of_gpt2(C, device):
    x, w = normal(12000, C, dtype=torch.bfloat16, device=device), normal(50304, C, dtype=torch.bfloat16, device=device)
    check_head(x, w * C**-0.5, targets_of(12000, 50257, device), 50257)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures torch's CPU allocator")
def test_logits_never_exist_at_once(monkeypatch):
    """The largest allocation holds one chunk of logits."""
    monkeypatch.setattr(launch, "head_rows", lambda *_: 8)
    x, w, targets = normal(64, 4).requires_grad_(), normal(100, 4, seed=1).requires_grad_(), targets_of(64, 100, "cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(x, w, targets).backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) == 8 * 100 * 4


@pytest.mark.parametrize("scale", [1.0, 0.125, 65536.0])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("N", ROWS_SCALED)
def test_gradient_scaling_of_the_head(N, scale, dtype, device):
    C, V = 16, 256
    x, w = normal(N, C, dtype=DTYPES[dtype], device=device), normal(V, C, dtype=DTYPES[dtype], device=device, seed=1)
    targets = targets_of(N, V, device)

    def base(inputs, cotangents):
        results = honest_head(inputs, [c * scale for c in cotangents], targets, V)
        return results._replace(outputs=[results.outputs[0] * scale])

    kernel, judge = (partial(fn, targets=targets) for fn in (linear_cross_entropy, reference.linear_cross_entropy))
    assert_kernel_is_as_accurate(lambda *t: kernel(*t) * scale, lambda *t: judge(*t) * scale, [x, w], base=base)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_scale_is_not_rounded_to_the_gradients_dtype(dtype, device):
    """The factor lies between two numbers of the dtype: rounded, it would change every gradient by 0.3% or 0.04%."""
    x, w = (
        normal(64, 64, dtype=DTYPES[dtype], device=device),
        normal(256, 64, dtype=DTYPES[dtype], device=device, seed=1),
    )
    kernel = partial(linear_cross_entropy, targets=targets_of(64, 256, device, ignored=False))
    eps = torch.finfo(DTYPES[dtype]).eps
    factor = (int(1.37 / eps) + 0.5) * eps
    once, more = (outputs_and_gradients(kernel, [x, w], [torch.tensor(c, device=device)]) for c in (1.0, factor))
    for a, b in zip(once.gradients, more.gradients):
        ratio = (b.double().abs().sum() / a.double().abs().sum()).item()
        assert ratio == pytest.approx(factor, rel=0.08 * eps)


def test_accumulation_and_a_kept_graph(device):
    x, w, targets = normal(20, 8, device=device), normal(64, 8, device=device, seed=1), targets_of(20, 60, device)
    x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, targets, 60)
    loss.backward(retain_graph=True)
    once = x.grad.clone(), w.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(w.grad, 2 * once[1])


@pytest.mark.parametrize("needs", ["neither", "x", "w", "both, no_grad"])
def test_only_needed_gradients_are_computed(needs, device):
    x, w = normal(20, 8, device=device), normal(64, 8, device=device, seed=1)
    targets = targets_of(20, 60, device)
    x.requires_grad_(needs in ("x", "both, no_grad")), w.requires_grad_(needs in ("w", "both, no_grad"))
    with torch.set_grad_enabled(needs != "both, no_grad"):
        loss = linear_cross_entropy(x, w, targets, 60)
    torch.testing.assert_close(loss.detach(), reference.linear_cross_entropy(x, w, targets, 60).detach())
    assert loss.requires_grad == (needs in ("x", "w"))
    if loss.requires_grad:
        loss.backward()
        want = torch.autograd.grad(reference.linear_cross_entropy(x, w, targets, 60), x if needs == "x" else w)[0]
        torch.testing.assert_close((x if needs == "x" else w).grad, want)
