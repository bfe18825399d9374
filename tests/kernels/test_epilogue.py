"""mlp with GELU in its matmuls' epilogues, against the reference at the same dtype, with and without TMA."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gpt2fast import reference
from gpt2fast.kernels import launch
from gpt2fast.kernels.epilogue import linear_gelu_bwd, linear_gelu_fwd, mlp
from tests.tools.accuracy import assert_kernel_is_as_accurate, outputs_and_gradients
from tests.tools.inputs import COMPILERS, DTYPES, LAYOUTS, normal

pytestmark = pytest.mark.kernel


SHAPES = {
    # rows, C, F
    "GPT-2's depth": (4, 768, 520),
    "more tiles than programs, also of rows": (1100, 32, 136),
    "more rows than a tile, not a multiple": (150, 48, 200),
    "prime, so TMA cannot reach its rows": (131, 37, 149),
    "one row": (1, 48, 200),
    "one of each": (1, 1, 1),
    "TMA cannot reach rows of F": (5, 64, 100),
    "empty": (0, 48, 200),
}


def inputs(M: int, C: int, F: int, dtype: torch.dtype, device, lead: tuple = ()) -> list[Tensor]:
    n = partial(normal, device=device)
    made = [n(*lead, M, C), n(F, C) / C**0.5, n(F, seed=1), n(C, F) / F**0.5, n(C, seed=2)]
    return [x.to(dtype) for x in made]


def base(inputs, cotangents):
    """The arithmetic of torch, which rounds dy proj_w as well."""
    return outputs_and_gradients(reference.mlp, inputs, cotangents)


def check(fn, given: list[Tensor]) -> None:
    assert_kernel_is_as_accurate(fn, reference.mlp, given, base=base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, device):
    check(mlp, inputs(*SHAPES[shape], DTYPES[dtype], device))


@pytest.mark.gpu
@pytest.mark.parametrize("C", [768, 1600])
def test_sizes_of_gpt2(C, device):
    check(mlp, inputs(65536, C, 4 * C, torch.bfloat16, device))


@pytest.mark.parametrize("lead", [(2,), (2, 3), (0, 3), (2, 0)], ids=str)
def test_leading_dimensions(lead, device):
    given = inputs(5, 48, 200, torch.bfloat16, device, lead)
    check(mlp, given)
    check(mlp, [given[0].flatten(0, -2)[:1].flatten(), *given[1:]] if given[0].numel() else given)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    """Among them one that is dense, but at an address that TMA cannot reach."""
    check(mlp, [LAYOUTS[layout](x) for x in inputs(7, 48, 200, DTYPES[dtype], device)])


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("tma", [False, True])
def test_tiles_of_every_architecture(capability, tma, device, monkeypatch):
    """Halves and quarters of columns, steps of 32 and of 64: all must give the same numbers."""
    if device.type == "cuda" and (capability[0] != torch.cuda.get_device_capability()[0] or tma != (capability[0] > 8)):
        pytest.skip("for another architecture")
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    monkeypatch.setattr(launch, "matmul_tma", lambda dtype, capability: tma)
    check(mlp, inputs(150, 72, 296, torch.float16, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_recomputes_the_same_bits(dtype, device):
    x, fc_w, fc_b, proj_w, _ = inputs(150, 48, 200, DTYPES[dtype], device)
    h, a = linear_gelu_fwd(x, fc_w, fc_b)
    assert torch.equal(linear_gelu_bwd(x, proj_w, h)[1], a)


def test_the_same_bits_every_time(device):
    given = inputs(600, 48, 136, torch.bfloat16, device)
    first, second = (outputs_and_gradients(mlp, given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.gradients + first.outputs, second.gradients + second.outputs))


def test_the_bias_gradient_is_summed_before_it_is_rounded(device):
    """Each of these dh is less than half of the smallest fp16 number."""
    M = 1000
    dy, proj_w = (torch.full(shape, 1e-4, dtype=torch.float16, device=device) for shape in ((M, 1), (1, 8)))
    h = torch.full((M, 8), 10.0, dtype=torch.float16, device=device)  # gelu' = 1
    dh, _, db = linear_gelu_bwd(dy, proj_w, h)
    assert (dh == 0).all()
    torch.testing.assert_close(db.double(), M * (dy[0].double() @ proj_w.double()), rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_far_ends(dtype, device):
    """gelu and gelu' of h where the sigmoid is 0 or 1, and of NaN."""
    h = torch.tensor([-1e10, -1e4, -20.0, -0.0, 0.0, 20.0, 1e4, 1e10, float("nan")], device=device).to(DTYPES[dtype])
    one = torch.ones(1, 1, device=device, dtype=h.dtype)
    dh, a, db = linear_gelu_bwd(one, one.expand(1, 9), h[None])
    wanted = torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1], device=device, dtype=h.dtype)
    assert torch.equal(a[0, :-1], h[:-1] * (h[:-1] > 0))
    assert torch.equal(dh[0, :-1], wanted)
    assert torch.equal(db[:-1], wanted)
    assert all(x.flatten()[-1].isnan() for x in (dh, a, db))


def test_the_left_tail_keeps_its_digits(device):
    h = torch.linspace(-6, -3, 1000, device=device)[None]
    one = torch.ones(1, 1, device=device)
    dh, a, _ = linear_gelu_bwd(one, one.expand(1, 1000), h)
    leaf = h.double().requires_grad_()
    truth = nn.functional.gelu(leaf, approximate="tanh")
    (slope,) = torch.autograd.grad(truth.sum(), leaf)
    for got, want in ((a, truth), (dh, slope)):
        assert ((got.double() - want) / want).abs().max() < 1e-5


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (1, 2, 3, 4), (0, 2)], ids=str)
def test_only_needed_gradients_are_computed(needed, device):
    given = inputs(7, 48, 200, torch.bfloat16, device)
    every = outputs_and_gradients(mlp, given)
    leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(given)]
    y = mlp(*leaves)
    y.backward(every.cotangents[0])
    assert torch.equal(y, every.outputs[0])
    for i, (leaf, want) in enumerate(zip(leaves, every.gradients)):
        assert torch.equal(leaf.grad, want) if i in needed else leaf.grad is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast(dtype, device):
    """fp32 weights, and x from LayerNorm: results as for inputs in autocast's dtype, gradients in the inputs' own."""
    given = inputs(7, 48, 200, torch.float32, device)
    given[0] = given[0].to(DTYPES[dtype])
    low = [x.to(DTYPES[dtype]) for x in given]
    with torch.autocast(device.type, DTYPES[dtype]):
        got = outputs_and_gradients(mlp, given)
    want = outputs_and_gradients(mlp, low)
    assert torch.equal(got.outputs[0], want.outputs[0])
    assert [g.dtype for g in got.gradients] == [x.dtype for x in given]
    assert all(torch.equal(g, w.to(g.dtype)) for g, w in zip(got.gradients, want.gradients))
    off = torch.autocast(device.type, DTYPES[dtype], enabled=False)
    with off, pytest.raises(TypeError, match="mlp: x is torch.* and fc_w is torch.float32: convert one of them"):
        mlp(*given)


def test_only_x_h_and_the_weights_are_kept(device):
    """a would be as large as h."""
    given = [x.requires_grad_() for x in inputs(150, 48, 200, torch.bfloat16, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        mlp(*given)
    assert sorted(kept) == sorted([(150, 48), (150, 200), (200, 48), (48, 200)])


def test_beyond_2_31_elements(run_python):
    """Run the last tile of matrices of more than 2^31 elements, of which no other page exists."""
    code = """
import sys
import torch
from tests.tools import interpreter
from gpt2fast.kernels import epilogue
interpreter.repair()
M, N, K, half = 2**21 + 128, 1024, 16, torch.float16
x, h, a, dh = (torch.empty(M, n, dtype=half) for n in (K, N, N, N))
w, b, db = torch.randn(N, K).half(), torch.randn(N).half(), torch.empty(M // 128, N)
x[-128:] = torch.randn(128, K)
sizes = dict(M=M, N=N, K=K, PROGRAMS=2**30, BLOCK_M=128, BLOCK_N=128, BLOCK_K=16, PIECES=2)
shared = dict(PRECISION="ieee", TMA=False, **sizes)
with interpreter.only_program(M // 128 * (N // 128) - 1):
    epilogue._linear_gelu_fwd_kernel[(1,)](x_ptr=x, w_ptr=w, b_ptr=b, h_ptr=h, a_ptr=a, **shared)
    kept = a[-128:, -128:].clone()
    a[-128:, -128:] = 0
    epilogue._linear_gelu_bwd_kernel[(1,)](
        dy_ptr=x, w_ptr=w.t().contiguous(), h_ptr=h, dh_ptr=dh, a_ptr=a, db_ptr=db, **shared)
product = x[-128:].float() @ w[-128:].float().t()
leaf = (product + b[-128:].float()).requires_grad_()
gelu = torch.nn.functional.gelu(leaf, approximate="tanh")
(want,) = torch.autograd.grad(gelu, leaf, product)
assert torch.equal(a[-128:, -128:], kept)
for got, wanted in ((h, leaf), (a, gelu), (dh, want)):
    torch.testing.assert_close(got[-128:, -128:].float(), wanted, rtol=1e-2, atol=1e-2)
torch.testing.assert_close(db[-1, -128:], want.sum(0), rtol=1e-2, atol=1e-1)
"""
    run_python("-c", code, env={"TRITON_INTERPRET": "1"}, check=True)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_as_one_graph(dynamic, backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, dynamic=dynamic, backend=backend)
    for M in (7, 150) if dynamic else (7,):
        check(compiled, inputs(M, 48, 200, torch.float32, device))
        check(compiled, inputs(M, 48, 200, torch.bfloat16, device))


def test_bad_arguments_are_refused(device):
    x, fc_w, fc_b, proj_w, proj_b = inputs(4, 8, 16, torch.float32, device)
    with pytest.raises(TypeError, match=r"mlp: x is torch.float32 and proj_b is torch.bfloat16: convert one of them"):
        mlp(x, fc_w, fc_b, proj_w, proj_b.bfloat16())
    with pytest.raises(TypeError, match=r"mlp: x is torch.float64: it must be float32, bfloat16 or float16"):
        mlp(x.double(), fc_w, fc_b, proj_w, proj_b)
    with pytest.raises(ValueError, match=r"mlp: fc_w has shape \(16, 8\): it must be \(16, 7\)"):
        mlp(x[:, :7], fc_w, fc_b, proj_w, proj_b)
    with pytest.raises(ValueError, match=r"mlp: fc_w has shape \(16, 8\): it must be \(15, 8\)"):
        mlp(x, fc_w, fc_b[:15], proj_w, proj_b)
    with pytest.raises(ValueError, match=r"mlp: proj_w has shape \(8, 15\): it must be \(8, 16\)"):
        mlp(x, fc_w, fc_b, proj_w[:, :15], proj_b)
    with pytest.raises(ValueError, match=r"mlp: proj_b has shape \(8, 1\): it must be \(8,\)"):
        mlp(x, fc_w, fc_b, proj_w, proj_b[:, None])
    with pytest.raises(ValueError, match=r"mlp: fc_b has shape \(16, 1\): it must be \(16,\)"):
        mlp(x, fc_w, fc_b[:, None], proj_w, proj_b)
    with pytest.raises(ValueError, match=r"mlp: fc_w is \(16, 0\), proj_w \(8, 16\): both must have elements"):
        mlp(x[:, :0], fc_w[:, :0], fc_b, proj_w, proj_b)
    with pytest.raises(ValueError, match=r"mlp: x is on .* and fc_b on meta: move one of them"):
        mlp(x, fc_w, fc_b.to("meta"), proj_w, proj_b)
