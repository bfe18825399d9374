"""The reference equals its formulas, written naively in float64 and differentiated by autograd in every argument."""

import math

import pytest
import torch
from torch import Tensor

from gpt2fast import cpu, ops, reference
from gpt2fast.model import GPT, GPTConfig
from tests.tools.inputs import COMPILERS
from tests.tools.instructions import attends

OPS = ops.build(ops.OpsConfig())
EPS = 1e-5


def naive_layer_norm(x, w, b, eps):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / torch.sqrt(var + eps) * w + b


def naive_embedding(wte, wpe, idx, dtype):
    """Compute one position of one sequence at a time."""
    B, T = idx.shape
    rows = [wte[token] + wpe[i % T] for i, token in enumerate(idx.flatten().tolist())]
    return torch.stack(rows).view(B, T, -1).to(dtype)


def naive_add_layer_norm(x, y, w, b, eps):
    return x + y, naive_layer_norm(x + y, w, b, eps)


def naive_attention(qkv, n_head):
    """Compute one query of one head of one sequence at a time."""
    B, T, C3 = qkv.shape
    C, D = C3 // 3, C3 // 3 // n_head
    rows = []
    for b in range(B):
        for t in range(T):
            heads = []
            for h in range(n_head):
                q = qkv[b, t, h * D : (h + 1) * D]
                k = qkv[b, : t + 1, C + h * D : C + (h + 1) * D]
                v = qkv[b, : t + 1, 2 * C + h * D : 2 * C + (h + 1) * D]
                p = (k @ q / math.sqrt(D)).exp()
                heads.append(p / p.sum() @ v)
            rows.append(torch.cat(heads))
    return torch.stack(rows).view(B, T, C)


def naive_mlp(x, fc_w, fc_b, proj_w, proj_b):
    u = x @ fc_w.T + fc_b
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return gelu @ proj_w.T + proj_b


def naive_linear(x, w, b=None):
    return x @ w.T if b is None else x @ w.T + b


def naive_linear_cross_entropy(x, w, targets, vocab_size=None):
    logits = x @ w[:vocab_size].T
    losses = [logits[i].exp().sum().log() - logits[i, t] for i, t in enumerate(targets.tolist()) if t != -100]
    return sum(losses) / len(losses)


NAIVE = {name.removeprefix("naive_"): fn for name, fn in list(globals().items()) if name.startswith("naive_")}

IDX = torch.tensor([[3, 0, 6, 3, 3], [6, 1, 3, 5, 0]])
TARGETS = torch.tensor([0, 12, 5, -100, 12])
CASES = [
    # name, shapes of the tensors, other arguments
    pytest.param("embedding", [(7, 4), (9, 4)], (IDX,), id="embedding"),
    pytest.param("embedding", [(7, 13), (1, 13)], (IDX[:, :1],), id="embedding-of-one-position"),
    pytest.param("layer_norm", [(2, 3, 8), (8,), (8,)], (EPS,), id="layer_norm"),
    pytest.param("layer_norm", [(5, 13), (13,), (13,)], (0.1,), id="layer_norm-odd-and-a-large-eps"),
    pytest.param("layer_norm", [(1, 1), (1,), (1,)], (EPS,), id="layer_norm-of-one-number"),
    pytest.param("add_layer_norm", [(2, 3, 8), (2, 3, 8), (8,), (8,)], (EPS,), id="add_layer_norm"),
    pytest.param("add_layer_norm", [(7, 11), (7, 11), (11,), (11,)], (EPS,), id="add_layer_norm-odd"),
    pytest.param("attention", [(2, 5, 24)], (2,), id="attention"),
    pytest.param("attention", [(1, 17, 3 * 15)], (3,), id="attention-odd"),
    pytest.param("attention", [(3, 1, 12)], (4,), id="attention-of-one-position-in-heads-of-one"),
    pytest.param("mlp", [(2, 3, 4), (16, 4), (16,), (4, 16), (4,)], (), id="mlp"),
    pytest.param("mlp", [(5, 7), (13, 7), (13,), (7, 13), (7,)], (), id="mlp-odd"),
    pytest.param("linear", [(2, 3, 4), (6, 4), (6,)], (), id="linear"),
    pytest.param("linear", [(5, 7), (3, 7)], (), id="linear-odd-without-bias"),
    pytest.param("linear_cross_entropy", [(5, 8), (16, 8)], (TARGETS,), id="linear_cross_entropy"),
    pytest.param("linear_cross_entropy", [(5, 7), (17, 7)], (TARGETS, 13), id="linear_cross_entropy-odd-and-padded"),
]


def arguments(name: str, others: tuple, dtype: torch.dtype) -> tuple:
    """Return the arguments without gradients; for embedding they include the dtype."""
    return (*others, dtype) if name == "embedding" else others


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def value_and_gradients(fn, inputs, others) -> list[Tensor]:
    outputs = fn(*inputs, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *(g.to_dense() for g in torch.autograd.grad(outputs, inputs, grads))]


def test_every_name_has_a_formula_here():
    assert set(NAIVE) == set(ops.NAMES) == {case.values[0] for case in CASES}


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize(("name", "shapes", "others"), CASES)
def test_forward_and_every_gradient_are_the_formula_in_float64(name, shapes, others, module):
    others = arguments(name, others, torch.float64)
    expected = value_and_gradients(NAIVE[name], tensors(shapes), others)
    got = value_and_gradients(getattr(module, name), tensors(shapes), others)
    # float64 in, float64 out, for the loss too: the reference in float64 is the truth that kernels are tested against
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "shapes", "others"), CASES)
def test_outputs_have_the_dtype_of_the_input(name, shapes, others, dtype):
    outputs = getattr(OPS, name)(*tensors(shapes, dtype), *arguments(name, others, dtype))
    expected = torch.float32 if name == "linear_cross_entropy" else dtype
    assert {o.dtype for o in (outputs if isinstance(outputs, tuple) else (outputs,))} == {expected}


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "shapes", "others"), CASES[2:])
def test_under_autocast_outputs_have_its_dtype(name, shapes, others, stream):
    x, *rest = tensors(shapes, torch.float32)
    if name == "add_layer_norm":
        rest[0] = rest[0].to(stream)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = getattr(OPS, name)(x.to(stream), *rest, *others)
    if name == "add_layer_norm":
        assert [o.dtype for o in outputs] == [stream, torch.bfloat16]
    else:
        assert outputs.dtype == (torch.float32 if name == "linear_cross_entropy" else torch.bfloat16)


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("stream", DTYPES, ids=str)
def test_the_embedding_is_added_in_fp32_and_rounded_once_to_the_given_dtype(stream, autocast, module):
    wte, wpe = tensors([(7, 40), (9, 40)], torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = module.embedding(wte, wpe, IDX, stream)
    assert torch.equal(x, (wte[IDX] + wpe[:5]).to(stream))
    gradients = torch.autograd.grad(x.sum(), [wte, wpe])
    assert [g.dtype for g in gradients] == 2 * [torch.float32]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_residual_sum_promotes(autocast):
    x, y, w, b = tensors([(3, 8), (3, 8), (8,), (8,)], torch.float32)
    y = y.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        s, h = OPS.add_layer_norm(x, y, w, b, EPS)
    assert s.dtype == torch.float32
    assert h.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(s, x + y.float())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("T", "future"), [(7, 3), (130, 65), (257, 256)], ids=str)
def test_no_position_depends_on_a_later_one(T, future, dtype):
    attends(dtype)
    (qkv,) = tensors([(2, T, 3 * 48)], dtype)
    before = OPS.attention(qkv, 3)[:, :future]
    changed = qkv.detach().clone()
    changed[:, future:] = 100 * changed[:, future:].flip(-1)
    assert torch.equal(OPS.attention(changed, 3)[:, :future], before)
    (gradient,) = torch.autograd.grad(before.float().square().sum(), qkv)
    assert gradient[:, :future].abs().sum() > 0
    assert gradient[:, future:].abs().sum() == 0


def test_an_ignored_target_counts_neither_in_the_sum_nor_in_the_divisor():
    x, w = tensors([(6, 8), (16, 8)], torch.float32)
    targets = torch.tensor([3, -100, 7, -100, 0, 15])
    kept = targets != -100
    loss = OPS.linear_cross_entropy(x, w, targets)
    torch.testing.assert_close(loss, OPS.linear_cross_entropy(x[kept], w, targets[kept]))
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient != 0).any(1).tolist() == kept.tolist()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_padded_rows_have_probability_and_gradient_zero(autocast):
    x, w = tensors([(6, 8), (64, 8)], torch.float32)
    w.data[50:] *= 1e4  # rows that would get all of the probability
    targets = torch.tensor([3, 49, 7, 11, 0, 15])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        padded = OPS.linear_cross_entropy(x, w, targets, 50)
        plain = OPS.linear_cross_entropy(x, w[:50], targets)
    torch.testing.assert_close(padded, plain)
    (dx, dw), (dx_plain, dw_plain) = (torch.autograd.grad(loss, (x, w)) for loss in (padded, plain))
    assert dw[50:].abs().sum() == 0
    torch.testing.assert_close(dw, dw_plain)
    torch.testing.assert_close(dx, dx_plain)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_model_of_these_ops_compiles_as_one_graph(autocast, backend, device):
    torch._dynamo.reset()
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=70)
    model = GPT(config, ops.build(ops.OpsConfig(), device.type)).to(device)
    idx = torch.randint(70, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)

    def loss_and_gradients(forward) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = forward(idx[:, :-1], idx[:, 1:])
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    got = loss_and_gradients(torch.compile(model, fullgraph=True, backend=backend))
    # fused bf16 chains round less often
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(got, loss_and_gradients(model), **tolerance)
