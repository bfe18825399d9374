"""Every kernel with torch's compiler, opcheck, autocast, checkpointing, DDP and graph capture."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gpt2fast import kernels
from gpt2fast.kernels import epilogue
from gpt2fast.kernels.registration import NAMESPACE
from tests.tools.inputs import COMPILERS, normal

pytestmark = pytest.mark.kernel


IDX = torch.tensor([[3, 0, 3, 19, 7, 3, 3], [7, 3, 3, 1, 0, 0, 3]])
TARGETS = torch.tensor([0, 5, -100, 59, 17, 3])


class Call(NamedTuple):
    """A public function, and its floating-point `inputs`."""

    fn: Callable
    inputs: list[Tensor]


def public(device="cpu", dtype=torch.float32) -> dict[str, Call]:
    n = partial(normal, device=device, dtype=dtype)
    targets = TARGETS.to(device)
    wb = [n(48, seed=1), n(48, seed=2)]
    return {
        "embedding": Call(lambda wte, wpe: kernels.embedding(wte, wpe, IDX.to(device), dtype), [n(20, 48), n(9, 48)]),
        "gelu": Call(kernels.gelu, [n(6, 48)]),
        "bias_gelu": Call(kernels.bias_gelu, [n(6, 48), n(48)]),
        "layer_norm": Call(kernels.layer_norm, [n(6, 48), *wb]),
        "add_layer_norm": Call(kernels.add_layer_norm, [n(6, 48, seed=3), n(6, 48), *wb]),
        "flash_attention": Call(kernels.flash_attention, [n(1, 2, 20, 16, seed=s) for s in (1, 2, 3)]),
        "attention": Call(partial(kernels.attention, n_head=2), [n(2, 20, 96)]),
        "cross_entropy": Call(partial(kernels.cross_entropy, targets=targets, vocab_size=60), [n(6, 64)]),
        "linear_cross_entropy": Call(
            lambda x, w: kernels.linear_cross_entropy(x, w, targets, 60), [n(6, 16), n(64, 16, seed=1)]
        ),
        "linear": Call(kernels.linear, [n(6, 16), n(32, 16), n(32)]),
        "mlp": Call(kernels.mlp, [n(6, 16), n(64, 16), n(64), n(16, 64), n(16)]),
        "mlp, epilogue": Call(epilogue.mlp, [n(6, 16), n(64, 16), n(64), n(16, 64), n(16)]),
    }


NAMES = list(public())


def registered() -> dict[str, list[tuple]]:
    """Return arguments for every op of the namespace: plain ones, and layouts that the fake must not copy."""
    n = normal
    x, y, b, wide = n(6, 48), n(6, 48, seed=1), n(48, seed=2), n(48, 6).t()
    mean, rstd = n(6), n(6).abs() + 1
    q, lse = n(1, 2, 20, 16), n(1, 2, 20)
    turned = n(1, 20, 2, 16).transpose(1, 2)
    qkv, o = n(2, 20, 96), n(2, 20, 32)
    logits, fp32, head = n(6, 64), torch.float32, (n(6, 16), n(64, 16, seed=1), TARGETS)
    return {
        "embedding_fwd": [(n(20, 48), n(9, 48), IDX, fp32), (n(48, 20).t(), n(48, 9).t(), IDX.t(), torch.float16)],
        "embedding_bwd": [
            (n(2, 7, 48), IDX, 20, 9, fp32), (n(2, 7, 48).half(), IDX.t().reshape(7, 2).t(), 20, 7, fp32),
        ],
        "gelu_fwd": [(x,), (wide,), (n(0, 8),)],
        "gelu_bwd": [(y, x), (y, wide)],
        "bias_gelu_fwd": [(x, b), (wide, b), (n(0, 48), b)],
        "bias_gelu_bwd": [(y, x, b), (y, wide, b), (n(0, 48), n(0, 48), b)],
        "linear_gelu_fwd": [
            (x.half(), n(24, 48).half(), n(24).half()), (wide, n(48, 24).t(), n(24)), (n(0, 2, 48), n(24, 48), n(24)),
        ],
        "linear_gelu_bwd": [
            (x.half(), n(48, 24).half(), n(6, 24).half()), (wide, n(24, 48).t(), n(24, 6).t()),
            (n(0, 2, 48), n(48, 24), n(0, 2, 24)),
        ],
        "layer_norm_fwd": [(x, b, b, 1e-5, fp32), (wide, b, b, 1e-5, torch.float16)],
        "layer_norm_bwd": [(y, x, b, mean, rstd), (wide, wide, b, mean, rstd)],
        "add_layer_norm_fwd": [(x, y.half(), b, b, 1e-5, torch.float16), (wide, y, b, b, 1e-5, fp32)],
        "add_layer_norm_bwd": [
            (y, x, x, b, mean, rstd, fp32), (None, x, wide, b, mean, rstd, torch.float16),
        ],
        "flash_attention_fwd": [(q, q, q, True, 0.25), (turned, turned, turned, False, 0.25)],
        "flash_attention_bwd": [(q, q, q, q, q, lse, True, 0.25), (turned, turned, q, q, q, lse, False, 0.25)],
        "attention_fwd": [(qkv, 2, 0.25), (n(20, 2, 96).transpose(0, 1), 2, 0.25)],
        "attention_bwd": [
            (o, qkv, o, n(2, 2, 20), 2, 0.25), (o, n(20, 2, 96).transpose(0, 1), o, n(2, 2, 20), 2, 0.25),
        ],
        "cached_attention_": [
            (n(2, 96), n(2, 2, 20, 16), n(2, 2, 20, 16), torch.tensor([3, 19]), 2),
            (n(96, 2).half().t(), n(2, 2, 20, 16).half(), n(2, 2, 20, 16).half(), torch.tensor([0, 7]), 2),
        ],
        "cross_entropy_fwd": [(logits, TARGETS, 60, -100), (n(64, 6).t(), TARGETS, 60, -100)],
        "cross_entropy_fwd_grad": [(logits, TARGETS, 60, -100), (n(64, 6).t(), TARGETS, 60, -100)],
        "cross_entropy_fwd_grad_": [(logits, TARGETS, 60, -100)],
        "scale_": [(x, torch.tensor(2.0)), (x, torch.tensor(1.0))],
        "scaled": [(x, torch.tensor(2.0), torch.float16), (wide, torch.tensor(1.0), fp32)],
        "linear_cross_entropy_fwd": [
            (*head, fp32, 60, 4, True, True), (*head, fp32, 60, 6, False, False),
            (*head, torch.float16, 60, 6, True, False),
        ],
    }  # fmt: skip


def to(device, args):
    return tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)


def gradients(fn: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Return outputs, then gradients for fixed cotangents."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    directions = [normal(*o.shape, seed=9).to(o.device, o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, directions)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_every_op_of_the_namespace_is_in_the_table():
    prefix = f"{NAMESPACE}::"
    found = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    ours = {name.removeprefix(prefix) for name in found}
    assert {name for name in ours if not name.startswith("toy_")} == set(registered())


@pytest.mark.parametrize("name", registered())
def test_torchs_own_checks_of_schema_and_fake(name, device):
    for args in registered()[name]:
        library.opcheck(getattr(torch.ops.gpt2fast, name).default, to(device, args))


@pytest.mark.parametrize("name", registered())
def test_fakes_promise_the_strides_and_dtypes_that_the_ops_return(name, device):
    op = getattr(torch.ops.gpt2fast, name).default
    for args in registered()[name]:
        args = to(device, args)
        with FakeTensorMode() as mode:
            promised = op(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
        real = op(*args)
        real, promised = (out if isinstance(out, tuple) else (out,) for out in (real, promised))
        for r, p in zip(real, promised, strict=True):
            if r is not None:
                assert (p.shape, p.stride(), p.dtype, p.device) == (r.shape, r.stride(), r.dtype, r.device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_as_one_graph(name, backend, device):
    torch._dynamo.reset()
    call = public(device)[name]
    assert_same(gradients(torch.compile(call.fn, fullgraph=True, backend=backend), call.inputs), gradients(*call))


@pytest.mark.parametrize("name", ["layer_norm", "attention", "linear_cross_entropy"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_for_any_shape(name, backend, device):
    torch._dynamo.reset()
    n = partial(normal, device=device)
    fn, shapes = {
        "layer_norm": (kernels.layer_norm, lambda T: [n(T, 48), n(48), n(48)]),
        "attention": (partial(kernels.attention, n_head=2), lambda T: [n(2, T, 96)]),
        "linear_cross_entropy": (
            lambda x, w: kernels.linear_cross_entropy(x, w, TARGETS.to(device).repeat(9)[: len(x)], 60),
            lambda T: [n(T, 16), n(64, 16)],
        ),
    }[name]
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for T in (20, 33):
        assert_same(gradients(compiled, shapes(T)), gradients(fn, shapes(T)))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, device):
    """fp32 inputs under autocast: results as for inputs in its dtype, gradients in the inputs' own."""
    call = public(device)[name]
    with torch.autocast(device.type, torch.bfloat16):
        got = gradients(*call)
    outputs, dx = got[: len(got) - len(call.inputs)], got[len(got) - len(call.inputs) :]
    loss, stream = "cross_entropy" in name or name == "embedding", name == "add_layer_norm"
    assert [o.dtype for o in outputs] == [torch.float32] * (loss or stream) + [torch.bfloat16] * (not loss)
    assert all(g.dtype == torch.float32 for g in dx)
    if name in ("embedding", "layer_norm", "add_layer_norm", "cross_entropy"):  # these do not cast their inputs
        want = gradients(*call)
        for g, w in zip(got, want):
            torch.testing.assert_close(g.float(), w, rtol=0.02, atol=0.02)
    else:
        want = gradients(call.fn, [x.bfloat16() for x in call.inputs])
        for g, w in zip(got, want):
            torch.testing.assert_close(g.float(), w.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name, device):
    call = public(device)[name]
    assert_same(gradients(partial(checkpoint, call.fn, use_reentrant=False), call.inputs), gradients(*call))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "linear"])
def test_a_second_derivative_is_refused(name, device):
    fn, inputs = public(device)[name]
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    out = outputs[1] if isinstance(outputs, tuple) else outputs
    (dx,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_no_graph(name, device):
    fn, inputs = public(device)[name]
    with torch.no_grad():
        outputs = fn(*(x.requires_grad_() for x in inputs))
    assert not any(o.requires_grad for o in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.long
def test_two_processes_with_ddp_get_the_mean_gradient(run_python, tmp_path):
    code = """
import sys
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=60)

def model():
    return GPT(CONFIG, build(OpsConfig().with_backend("triton")))

def work(rank, path):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    gpt = DistributedDataParallel(model())
    gpt(IDX[rank], IDX[rank].roll(-1)).backward()
    if rank == 0:
        alone = model()
        sum(alone(idx, idx.roll(-1)) / 2 for idx in IDX).backward()
        for p, q in zip(gpt.module.parameters(), alone.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
        print("equal")
    distributed.barrier()  # a gloo process that exits before the other one crashes, once in twenty times
    distributed.destroy_process_group()

IDX = torch.arange(16).view(2, 1, 8)
if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
"""
    (tmp_path / "ddp.py").write_text(code)
    done = run_python(
        tmp_path / "ddp.py", tmp_path / "store", env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, check=True
    )
    assert "equal" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_cuda_graph(name, device):
    fn, inputs = public(device, torch.bfloat16)[name]
    leaves = [x.requires_grad_() for x in inputs]

    def both():
        outputs = fn(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize("module", ["attention_forward", "embeddings", "epilogue", "layernorm", "loss", "tanh_gelu"])
def test_names_of_kernels_begin_with_an_underscore(module):
    found = [name for name in vars(importlib.import_module(f"gpt2fast.kernels.{module}")) if name.endswith("_kernel")]
    assert found
    assert all(name.startswith("_") for name in found)
