"""Cross-entropy and linear + cross-entropy against torch: values, gradients, and which logits are overwritten."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.kernels import cross_entropy, launch, linear_cross_entropy
from tests.tools.accuracy import Results, assert_as_accurate, assert_kernel_is_as_accurate, outputs_and_gradients
from tests.tools.inputs import DTYPES, normal, targets_of

pytestmark = pytest.mark.kernel
# rows, columns, how many of them are padding: GPT-2's vocabulary, wider than a block, odd, one column, one row
SHAPES = [(3, 50304, 47), (4, 9001, 0), (13, 37, 5), (5, 1, 0), (1, 64, 1)]
# A row's share of the gradient is 1 / N: with 512 rows, fp16 loses it if it is not scaled in time
ROWS_SCALED = [64, pytest.param(512, marks=pytest.mark.long)]


def plain_reference(x, targets, vocab_size):
    x = x[:, :vocab_size]
    return F.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), targets)


def twice_rounded(inputs, cotangents, targets, vocab_size):
    """The gradient as computed before its scale is known: rounded then, and again when it is scaled."""
    (x,) = inputs
    leaf = x.float().requires_grad_()
    loss = plain_reference(leaf, targets, vocab_size)
    count = (targets != -100).sum()
    first = count if x.dtype == torch.float16 else 1
    (dx,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) * first)
    return Results([loss.detach()], [(dx.to(x.dtype).float() * (cotangents[0] / first)).to(x.dtype)], list(cotangents))


def check(x, targets, vocab_size):
    flags = {"targets": targets, "vocab_size": vocab_size}
    kernel, judge, base = (partial(fn, **flags) for fn in (cross_entropy, plain_reference, twice_rounded))
    assert_kernel_is_as_accurate(kernel, judge, [x], base=base)
    one = torch.ones((), device=x.device)  # as loss.backward(): only in fp16 is the gradient scaled afterwards
    assert_kernel_is_as_accurate(kernel, judge, [x], base=base if x.dtype == torch.half else None, cotangents=[one])
    got = outputs_and_gradients(kernel, [x])
    assert got.outputs[0].dtype == torch.float32
    assert (got.gradients[0][:, vocab_size:] == 0).all()
    assert (got.gradients[0][targets == -100] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "V", "padding"), SHAPES)
def test_cross_entropy(N, V, padding, dtype, device):
    check(normal(N, V, dtype=DTYPES[dtype], device=device), targets_of(N, V - padding, device), V - padding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_wider_than_a_block(dtype, device, monkeypatch):
    """Logits that grow along the row, so that the running maximum and sum are rescaled at each block."""
    monkeypatch.setattr(launch, "cross_entropy_block", lambda V: (128, 1))
    x = normal(6, 1000, device=device) + torch.linspace(-5, 5, 1000, device=device)
    check(x.to(DTYPES[dtype]), targets_of(6, 997, device), 997)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("times", [1e-3, 100.0, 1e4])
def test_logits_of_other_sizes(times, dtype, device):
    x = normal(6, 200, dtype=DTYPES[dtype], device=device) * times
    check(x, targets_of(6, 200, device), 200)


@pytest.mark.parametrize("values", ["equal", "one-hot", "offset"])
def test_other_values(values, device):
    check(normal(6, 200, device=device, values=values), targets_of(6, 200, device), 200)


@pytest.mark.long
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 600), st.integers(0, 70), st.sampled_from(list(DTYPES)))
def test_any_shape(device, N, V, padding, dtype):
    check(normal(N, V + padding, dtype=DTYPES[dtype], device=device), targets_of(N, V, device), V)


def test_padding_never_counts(device):
    x = normal(4, 64, device=device)
    targets = targets_of(4, 50, device)
    x[:, 50:] = 1e4
    loss = cross_entropy(x, targets, vocab_size=50)
    torch.testing.assert_close(loss, F.cross_entropy(x[:, :50], targets))
    x[:, 50:] = float("nan")
    leaf = x.requires_grad_()
    cross_entropy(leaf, targets, vocab_size=50).backward()
    assert leaf.grad.isfinite().all()


def test_the_gradient_overwrites_logits_that_were_computed(device):
    x = normal(4, 64, device=device).requires_grad_()
    targets = targets_of(4, 64, device)
    logits = x * 1.0
    before, address = logits.detach().clone(), logits.data_ptr()
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    cross_entropy(logits, targets).backward()
    assert seen == [address]
    assert not torch.equal(logits, before)
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(y := x * 1.0, targets), y)[0])


@pytest.mark.parametrize("why", ["inplace=False", "a leaf", "no_grad", "no gradient needed"])
def test_logits_that_are_kept(why, device):
    x = normal(4, 64, device=device).requires_grad_(why != "no gradient needed")
    logits = x if why == "a leaf" else x * 1.0
    before = logits.detach().clone()
    with torch.set_grad_enabled(why != "no_grad"):
        loss = cross_entropy(logits, targets_of(4, 64, device), inplace=why != "inplace=False")
    if why in ("inplace=False", "a leaf"):
        loss.backward()
    assert torch.equal(logits, before)


def test_an_op_that_saved_the_logits_raises_in_backward(device):
    logits = normal(4, 64, device=device).requires_grad_().tanh()  # tanh saves its result
    loss = cross_entropy(logits, targets_of(4, 64, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_graph_that_saved_the_logits_raises_in_backward(device):
    logits = normal(4, 64, device=device).requires_grad_() * 1.0
    penalty = logits.square().sum()  # saves logits
    cross_entropy(logits, targets_of(4, 64, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_a_second_backward_raises_if_the_gradient_was_scaled_in_place(device):
    x = normal(4, 64, device=device).requires_grad_()
    loss = cross_entropy(x * 1.0, targets_of(4, 64, device)) * 3.0
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.125, 65536.0])
@pytest.mark.parametrize("N", ROWS_SCALED)
def test_gradient_scaling(N, scale, dtype, device):
    """Scale as GradScaler and accumulation do: tiny gradients survive in fp16 because they are scaled in time."""
    V = 256
    x = normal(N, V, dtype=DTYPES[dtype], device=device)
    targets = targets_of(N, V, device)

    def base(inputs, cotangents):
        results = twice_rounded(inputs, [c * scale for c in cotangents], targets, V)
        return results._replace(outputs=[results.outputs[0] * scale])

    kernel, judge = partial(cross_entropy, targets=targets), partial(plain_reference, targets=targets, vocab_size=V)
    assert_kernel_is_as_accurate(lambda x: kernel(x) * scale, lambda x: judge(x) * scale, [x], base=base)


def test_tiny_gradients_survive_in_fp16(device):
    """For words that are not a target, p / N has few bits in fp16; times GradScaler's scale it has all of them."""
    N, V, scale = 64, 2048, 65536.0
    x, targets = normal(N, V, dtype=torch.half, device=device), targets_of(N, V, device, ignored=False)
    got = outputs_and_gradients(lambda x: cross_entropy(x, targets) * scale, [x])
    truth = outputs_and_gradients(lambda x: plain_reference(x, targets, V) * scale, [x.double()], got.cotangents)
    base = twice_rounded([x], [got.cotangents[0] * scale], targets, V)
    others = torch.ones_like(x, dtype=torch.bool).scatter_(1, targets[:, None], False)
    got, truth, base = (results.gradients[0][others] for results in (got, truth, base))
    assert (truth / scale).abs().median() < 2 * torch.finfo(torch.half).tiny / 8
    assert_as_accurate(got, truth, base)


def test_targets_outside_the_vocabulary_make_the_loss_nan(device):
    x = normal(3, 64, device=device)
    for bad in (64, 60, -1, 2**40, -(2**40)):  # 60 is padding
        targets = torch.tensor([1, bad, 2], device=device)
        assert cross_entropy(x, targets, vocab_size=60).isnan()
        assert cross_entropy(x, targets, ignore_index=bad, vocab_size=60).isfinite()


def test_nothing_to_average(device):
    """As in torch, the loss is NaN, and the gradients are zero, so that other batches' gradients stay right."""
    ignored = torch.full((3,), -100, device=device)
    x, w = normal(3, 8, device=device).requires_grad_(), normal(20, 8, device=device).requires_grad_()
    for call in (lambda: cross_entropy(x, ignored), lambda: linear_cross_entropy(x, w, ignored)):
        loss = call()
        loss.backward()
        assert loss.isnan()
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()
    empty = normal(0, 8, device=device).requires_grad_()
    loss = cross_entropy(empty, torch.zeros(0, dtype=torch.long, device=device))
    loss.backward()
    assert loss.isnan()
    assert empty.grad.shape == (0, 8)


def test_any_strides(device):
    x = normal(64, 6, device=device).t()  # (6, 64), columns far apart
    check(x, targets_of(6, 64, device), 64)
    check(normal(6, 128, device=device)[:, ::2], targets_of(6, 64, device), 60)


def test_bad_arguments_are_refused(device):
    x, w, targets = normal(4, 8, device=device), normal(64, 8, device=device), targets_of(4, 64, device)
    with pytest.raises(TypeError, match=r"cross_entropy: targets are torch.int32: they must be int64"):
        cross_entropy(x, targets.int())
    with pytest.raises(ValueError, match=r"cross_entropy: targets has shape \(3,\): it must be \(4,\)"):
        cross_entropy(x, targets[:3])
    with pytest.raises(ValueError, match=r"cross_entropy: logits has shape \(2, 4, 8\): it must have two dimensions"):
        cross_entropy(torch.zeros(2, 4, 8, device=device), targets)
    for size in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"vocab_size is {size}: it must be between 1 and the 8 columns"):
            cross_entropy(x, targets, vocab_size=size)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: w has shape \(64, 7\): it must be \(64, 8\)"):
        linear_cross_entropy(x, w[:, :7], targets)
    with pytest.raises(TypeError, match=r"linear_cross_entropy: x is torch.float32 and w is torch.float16: convert"):
        linear_cross_entropy(x, w.half(), targets)
    with pytest.raises(ValueError, match=r"x is on .* and targets on meta"):
        linear_cross_entropy(x, w, targets.to("meta"))
