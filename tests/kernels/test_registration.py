"""A toy op, registered like all others: eager, compiled, checked by torch, under autocast, with odd layouts."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2fast.kernels import registration
from gpt2fast.kernels.registration import op
from tests.tools.accuracy import assert_as_accurate
from tests.tools.inputs import COMPILERS

BLOCK = 64


@triton.jit
def _silu_fwd_kernel(x_ptr, o_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(o_ptr + offs, x * tl.sigmoid(x), mask=offs < n)


@triton.jit
def _silu_bwd_kernel(x_ptr, do_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    do = tl.load(do_ptr + offs, mask=offs < n, other=0.0)
    s = tl.sigmoid(x)
    tl.store(dx_ptr + offs, do * s * (1 + x * tl.sigmoid(-x)), mask=offs < n)


@op("toy_silu_fwd", fake=lambda x: x.new_empty(x.shape))
def silu_fwd(x: Tensor) -> Tensor:
    x = x.contiguous()
    o = x.new_empty(x.shape)
    _silu_fwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, o, x.numel(), BLOCK=BLOCK)
    return o


@op("toy_silu_bwd", fake=lambda x, do: x.new_empty(x.shape))
def silu_bwd(x: Tensor, do: Tensor) -> Tensor:
    x, do = x.contiguous(), do.contiguous()
    dx = x.new_empty(x.shape)
    _silu_bwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, do, dx, x.numel(), BLOCK=BLOCK)
    return dx


class Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return silu_fwd(x)

    @staticmethod
    def backward(ctx, do):
        return silu_bwd(*ctx.saved_tensors, do)


def silu(x: Tensor) -> Tensor:
    return Silu.apply(x)


def dense(device) -> Tensor:
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(device)


LAYOUTS = {
    "contiguous": dense,
    "permuted": lambda device: dense(device).permute(2, 0, 1),  # the fake must not promise these strides
    "sliced": lambda device: dense(device)[:, ::2, 1:],
    "one": lambda device: dense(device)[0, 0, 0],
    "longer-than-a-block": lambda device: dense(device).repeat(4, 1, 1),
    "empty": lambda device: dense(device)[:, :0],
}


@pytest.fixture(params=LAYOUTS)
def x(request, device) -> Tensor:
    return LAYOUTS[request.param](device)


def value_and_gradient(fn, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    o = fn(x)
    return o, torch.autograd.grad(o, x, torch.cos(3 * o.detach()))[0]


def check(fn, x: Tensor) -> None:
    (o, dx), (truth, dtruth), (base, dbase) = (
        value_and_gradient(*pair) for pair in ((fn, x), (F.silu, x.double()), (F.silu, x))
    )
    assert o.is_contiguous()
    assert_as_accurate(o, truth, base, name="o")
    assert_as_accurate(dx, dtruth, dbase, name="dx")


def test_eager(x):
    check(silu, x)


@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_as_one_graph(device, dynamic, backend):
    torch._dynamo.reset()
    compiled = torch.compile(silu, fullgraph=True, dynamic=dynamic, backend=backend)
    for layout in ("contiguous", "permuted", "empty"):
        check(compiled, LAYOUTS[layout](device))


def test_torchs_own_checks_of_schema_and_fake(x):
    library.opcheck(silu_fwd, (x,))
    library.opcheck(silu_bwd, (x, torch.cos(x)))


def test_the_fake_promises_the_strides_that_the_op_returns(x):
    # opcheck of torch 2.11 does not compare strides
    with FakeTensorMode() as mode:
        promised = silu_fwd(mode.from_tensor(x))
    real = silu_fwd(x)
    assert (promised.shape, promised.stride()) == (real.shape, real.stride())


def test_autocast_does_not_reach_inside(device):
    x = LAYOUTS["contiguous"](device)
    with torch.autocast(device.type, torch.bfloat16):
        check(silu, x)


def test_the_op_is_in_torchs_namespace_and_is_called_like_the_function(device):
    x = LAYOUTS["contiguous"](device)
    assert silu_fwd is torch.ops.gpt2fast.toy_silu_fwd.default
    assert str(silu_bwd._schema) == "gpt2fast::toy_silu_bwd(Tensor x, Tensor do) -> Tensor"
    assert torch.Tag.pt2_compliant_tag in silu_fwd.tags
    assert torch.equal(silu_fwd(x), silu_fwd(x=x))


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_the_current_device_is_that_of_the_tensors_while_the_op_runs(monkeypatch, current, index):
    class Module:  # torch.cuda, on a machine with two GPUs
        now = current

        @classmethod
        def current_device(cls):
            return cls.now

        @classmethod
        @contextlib.contextmanager
        def device(cls, device):
            before, cls.now = cls.now, device.index
            yield
            cls.now = before

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    monkeypatch.setattr(registration, "Tensor", SimpleNamespace)
    x = SimpleNamespace(device=torch.device("cuda", index))
    assert registration._on_its_device(lambda x: Module.now)(x) == index
    assert Module.now == current


def test_the_kernel_runs_where_this_machine_can_run_it(device):
    interpreted = type(_silu_fwd_kernel).__name__ == "InterpretedFunction"
    assert interpreted == (device.type == "cpu")
