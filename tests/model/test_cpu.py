"""The seven names for a CPU: as accurate as the reference at the same dtype, in every case with code of its own."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import library

from gpt2fast import cpu, reference
from gpt2fast.machine.device import autocast
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import Ops
from gpt2fast.training import optim
from gpt2fast.training.step import TrainingStep
from tests.tools.accuracy import Results, assert_as_accurate, assert_kernel_is_as_accurate, outputs_and_gradients
from tests.tools.inputs import normal, randomise
from tests.tools.instructions import attends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IGNORE = reference.IGNORE


def judge(name, inputs, others=(), **options):
    """Compare cpu's op with the reference's, which at the same dtype is the honest arithmetic."""

    def theirs(*tensors):
        return getattr(reference, name)(*tensors, *others)

    def base(inputs, cotangents) -> Results:
        return outputs_and_gradients(theirs, inputs, cotangents)

    assert_kernel_is_as_accurate(lambda *x: getattr(cpu, name)(*x, *others), theirs, inputs, base=base, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 3, 40, 24), id="small"),
        pytest.param((7, 13, 11), id="odd"),
        pytest.param((1024, 768, 768), id="gpt2's, split in two"),
        pytest.param((2, 257, 300, 512), id="an odd number of rows, split in two"),
        pytest.param((1, 5, 3), id="one row"),
        pytest.param((0, 5, 3), id="no rows"),
    ],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear(shape, dtype, bias):
    n = partial(normal, dtype=DTYPES[dtype], device="cpu")
    *rows, wide, out = shape
    judge("linear", [n(*rows, wide), n(out, wide) / math.sqrt(wide)] + [n(out)] * bias)


def test_a_split_matmul_equals_the_whole_one():
    n = partial(normal, dtype=torch.bfloat16, device="cpu")
    a, b, bias = n(514, 64), n(64, 300), n(300)
    torch.testing.assert_close(cpu._matmul(a, b, bias), torch.addmm(bias, a, b))
    torch.testing.assert_close(cpu._matmul(a, b), a @ b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(dtype):
    n = partial(normal, dtype=DTYPES[dtype], device="cpu")
    judge("mlp", [n(2, 65, 48), n(192, 48) / 7, n(192), n(48, 192) / 14, n(48)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 2, 256, 64), id="gpt2's: two blocks of queries"),
        pytest.param((1, 3, 300, 16), id="a partial last block"),
        pytest.param((3, 2, 128, 32), id="nano's: one block"),
        pytest.param((2, 1, 17, 7), id="odd"),
        pytest.param((2, 2, 1, 8), id="one position"),
        pytest.param((2, 3, 520, 8), id="long: torch's backward"),
        pytest.param((0, 2, 8, 8), id="no sequences"),
    ],
)
def test_attention(shape, dtype, monkeypatch):
    B, H, T, D = shape
    attends(DTYPES[dtype])
    monkeypatch.setattr(cpu, "SCORES", 2 * 128 * T)  # two heads at a time, so that the last group may have one
    qkv = normal(B, T, 3 * H * D, dtype=DTYPES[dtype], device="cpu")
    judge("attention", [qkv], (H,), gradient_factor=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_where_probabilities_underflow(dtype):
    """Scores of +-100: exp underflows for all but the largest, and would overflow for masked keys."""
    qkv = normal(1, 40, 3 * 16, dtype=DTYPES[dtype], device="cpu") * 8
    judge("attention", [qkv], (1,), gradient_factor=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_allows_bf16_products_for_bf16_inputs_only(dtype, monkeypatch):
    """Read from torch's setting: a CPU without bf16 products ignores it, and its results would show no difference."""
    matmul, bmm, settings = torch.backends.mkldnn.matmul, torch.bmm, []
    before = matmul.fp32_precision

    def noted(*args):
        settings.append(matmul.fp32_precision)
        return bmm(*args)

    monkeypatch.setattr(torch, "bmm", noted)
    qkv = normal(1, 40, 3 * 16, dtype=DTYPES[dtype], device="cpu").requires_grad_()
    cpu.attention(qkv, 1).sum().backward()
    assert set(settings) == {"bf16" if dtype == "bf16" else before}
    assert before != "bf16"
    assert matmul.fp32_precision == before


def test_attention_takes_a_gradient_that_is_not_contiguous():
    qkv = normal(2, 9, 24, dtype=torch.float32, device="cpu")
    do = normal(9, 2, 8, dtype=torch.float32, device="cpu").transpose(0, 1)
    got, theirs = (
        outputs_and_gradients(lambda x, f=f: f(x, 2), [qkv], [do]) for f in (cpu.attention, reference.attention)
    )
    torch.testing.assert_close(got.gradients, theirs.gradients)


TARGETS = torch.arange(50) * 7 % 60
SOME_IGNORED = torch.where(torch.arange(50) % 3 == 1, IGNORE, TARGETS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 50, 1024], ids=lambda rows: f"chunks of {rows}")
@pytest.mark.parametrize("targets", [TARGETS, SOME_IGNORED], ids=["all count", "some are ignored"])
@pytest.mark.parametrize("scale", [1, 8], ids=lambda scale: f"logits times {scale}")
def test_linear_cross_entropy(dtype, rows, targets, scale, monkeypatch):
    monkeypatch.setattr(cpu, "ROWS", rows)
    n = partial(normal, dtype=DTYPES[dtype], device="cpu")
    judge("linear_cross_entropy", [n(50, 24), n(64, 24) / 5 * scale], (targets, 60))


@pytest.mark.parametrize("far", [0, 300], ids=["", "a probability of nearly zero"])
def test_a_large_offset_of_all_logits_is_not_rounded_into_the_loss(far):
    """Logits are integers a little above 4096, exact in fp32, while their logsumexp is rounded to 2^-11."""
    x = torch.cat([torch.eye(6), torch.ones(6, 1)], 1).requires_grad_()
    bits = torch.arange(60).reshape(10, 6) * 7 % 5.0
    bits[0] -= far
    w, targets = torch.cat([bits, torch.full((10, 1), 4096.0)], 1), torch.arange(2, 8)
    loss = cpu.linear_cross_entropy(x, w, targets)
    truth = F.cross_entropy(bits.t().double(), targets)
    assert abs(loss.item() - truth.item()) < 1e-6
    dlogits = bits.t().double().softmax(1) - F.one_hot(targets, 10)
    (dx,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(dx[:, :6], (dlogits @ bits.double() / 6).float(), rtol=1e-5, atol=1e-6)


def test_a_large_vocabulary_is_sampled():
    n = partial(normal, dtype=torch.bfloat16, device="cpu")
    judge("linear_cross_entropy", [n(40, 32), n(5000, 32) / 6], (torch.arange(40) * 123,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sampled_probability_of_nearly_zero_takes_the_full_logsumexp(dtype):
    """Logits of +-200: all probabilities but the largest underflow, and have no logarithm."""
    x = torch.eye(8, 16, dtype=DTYPES[dtype]) * 200
    w = torch.eye(40, 16, dtype=DTYPES[dtype]) - torch.eye(40, 16, dtype=DTYPES[dtype]).roll(3, 0)
    targets = torch.arange(8).flip(0)
    got = cpu.linear_cross_entropy(x, w, targets)
    torch.testing.assert_close(got, reference.linear_cross_entropy(x, w, targets), rtol=1e-5, atol=0)
    assert got > 100


def test_without_targets_the_loss_is_nan_and_its_gradient_zero_as_in_torch():
    for fn in (cpu.linear_cross_entropy, reference.linear_cross_entropy):
        x = normal(5, 8, dtype=torch.float32, device="cpu").requires_grad_()
        loss = fn(x, normal(12, 8, dtype=torch.float32, device="cpu"), torch.full((5,), IGNORE))
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].count_nonzero() == 0


@pytest.mark.parametrize("name", ["linear", "mlp", "attention", "linear_cross_entropy"])
def test_nan_inputs_give_nan_outputs_and_gradients(name):
    n = partial(normal, dtype=torch.float32, device="cpu")
    inputs, others = {
        "linear": ([n(3, 8), n(4, 8)], ()),
        "mlp": ([n(3, 8), n(16, 8), n(16), n(8, 16), n(8)], ()),
        "attention": ([n(1, 3, 24)], (2,)),
        "linear_cross_entropy": ([n(3, 8), n(12, 8)], (torch.tensor([1, 2, 3]),)),
    }[name]
    inputs[0].view(-1)[-1] = math.nan
    results = outputs_and_gradients(lambda *x: getattr(cpu, name)(*x, *others), inputs)
    assert results.outputs[0].isnan().any()
    assert any(gradient.isnan().any() for gradient in results.gradients)


def test_a_loss_without_gradients_does_not_compute_them(monkeypatch):
    n = partial(normal, dtype=torch.float32, device="cpu")
    x, w, targets = n(5, 8).requires_grad_(), n(12, 8).requires_grad_(), torch.arange(5)
    expected = cpu.linear_cross_entropy(x, w, targets).detach()
    products = []
    monkeypatch.setattr(cpu.torch, "mm", lambda *args, mm=torch.mm: products.append(args) or mm(*args))
    with torch.no_grad():
        assert torch.equal(cpu.linear_cross_entropy(x, w, targets), expected)
    assert len(products) == 1


@pytest.mark.parametrize("op", [cpu._attention_bwd, cpu._linear_cross_entropy], ids=str)
def test_the_operators_pass_torchs_opcheck(op):
    n = partial(normal, dtype=torch.bfloat16, device="cpu")
    if op is cpu._attention_bwd:
        samples = [(n(2, 9, 8), n(2, 9, 24), n(2, 9, 8), n(2, 2, 9).float(), 2)]
    else:
        samples = [(n(5, 8), n(12, 8), torch.tensor([3, IGNORE, 5, 0, 9]), 10, grads) for grads in (True, False)]
    for sample in samples:
        library.opcheck(op, sample, test_utils=("test_schema", "test_faketensor"))


OURS = Ops(**{name: getattr(cpu, name) for name in Ops.__dataclass_fields__})
THEIRS = Ops(**{name: getattr(reference, name) for name in Ops.__dataclass_fields__})
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=40, vocab_size=300)  # padded by 20


def gradients(ops: Ops, precision: str, seed: int) -> dict[str, torch.Tensor]:
    """Return the gradients of a model in which all parameters are random, as after some training."""
    model = GPT(CONFIG, ops)
    randomise(model, 0.05, seed)
    model = model.double() if precision == "fp64" else model
    tokens = torch.randint(300, (2, 41), generator=torch.Generator().manual_seed(seed))
    with autocast(torch.device("cpu"), "fp32" if precision == "fp64" else precision):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {name: g.to_dense() if g.is_sparse else g for (name, _), g in zip(model.named_parameters(), found)}


@pytest.mark.parametrize("precision", DTYPES)
def test_gradients_of_the_whole_model_are_as_accurate_as_the_references(precision):
    """Over 16 models, so that each parameter has many independent errors and the comparison holds on every CPU."""
    kinds = {"truth": (THEIRS, "fp64"), "base": (THEIRS, precision), "got": (OURS, precision)}
    found = {kind: [gradients(*what, seed) for seed in range(16)] for kind, what in kinds.items()}
    for name in found["truth"][0]:
        truth, base, got = (torch.stack([gradients[name] for gradients in found[kind]]) for kind in kinds)
        assert_as_accurate(got, truth, base, name=name)


def train(ops: Ops, precision: str, steps: int, compile: bool = False, seed: int = 1) -> torch.Tensor:
    """Return the losses of AdamW from the same weights on the same three batches."""
    model = GPT(CONFIG, ops)
    if precision == "fp64":
        model = model.double()
    tokens = torch.randint(300, (3, 2, 41), generator=torch.Generator().manual_seed(seed))
    step = TrainingStep(
        model, optim.adamw(model, 0.1), precision="fp32" if precision == "fp64" else precision, compile=compile
    )
    batches = iter([(tokens[i % 3, :, :-1], tokens[i % 3, :, 1:]) for i in range(steps)])
    return torch.stack([step(batches, 1e-3)[0].detach() for _ in range(steps)])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("steps", "runs"), [(40, 4), pytest.param(200, 8, marks=pytest.mark.long)])
def test_losses_of_many_steps_are_as_accurate_as_the_references(precision, steps, runs):
    """The errors of a run are one random draw and not one per step, since each grows out of those before it: two runs
    of the reference with another order of summation differ as much. So honest errors are taken from several runs."""
    nearby = [
        (train(THEIRS, "fp64", steps, seed=seed).double(), train(THEIRS, precision, steps, seed=seed))
        for seed in range(1, 1 + runs)
    ]
    truth, base = nearby[0]
    assert truth[-1] < (0.5 if steps == 200 else 0.9) * truth[0]
    assert_as_accurate(train(OURS, precision, steps), truth, base, name="losses", nearby=nearby)


@pytest.mark.long
@pytest.mark.parametrize("precision", DTYPES)
def test_compiled_blocks_give_the_same_losses_and_leave_the_model_uncompiled(precision):
    eager, compiled = train(OURS, precision, 5), train(OURS, precision, 5, compile=True)
    torch.testing.assert_close(compiled, eager, rtol=2e-6 if precision == "fp32" else 1e-3, atol=0)
