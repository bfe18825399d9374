"""The repaired interpreter against torch, bit for bit; and how our kernels refuse the one that is not repaired."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")

N = 1024
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3.4e38, -3.4e38, 1.00390625, 1.01171875]


@triton.jit
def _cast_kernel(x_ptr, o_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(o_ptr + offs, tl.load(x_ptr + offs).to(o_ptr.dtype.element_ty))


@triton.jit
def _store_kernel(x_ptr, o_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(o_ptr + offs, tl.load(x_ptr + offs))  # the cast is the store's


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, o_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs, mask=offs < N, other=0.0)
    tl.store(o_ptr + offs, x + y)
    tl.store(o_ptr + N + offs, x - y)
    tl.store(o_ptr + 2 * N + offs, x * y)
    tl.store(o_ptr + 3 * N + offs, tl.where(x < y, x, -y))
    tl.store(o_ptr + 4 * N + offs, tl.maximum(x, y))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, o_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    offs_m, offs_k, offs_n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :])
    y = tl.load(y_ptr + offs_n[:, None] * K + offs_k[None, :])
    tl.store(o_ptr + offs_m[:, None] * N + offs_n[None, :], tl.dot(x, tl.trans(y)))


@triton.jit
def _range_kernel(o_ptr, lo_ptr, hi_ptr):
    total = 0
    for i in range(tl.load(lo_ptr), tl.load(hi_ptr), 3):
        total += i
    tl.store(o_ptr, total)


def values(seed: int) -> torch.Tensor:
    x = torch.randn(N, generator=torch.Generator().manual_seed(seed)) * 10 ** torch.linspace(-38, 38, N)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", [_cast_kernel, _store_kernel], ids=["cast", "store"])
@pytest.mark.parametrize("dtypes", ["fp32 bf16", "bf16 fp32", "fp32 fp16", "fp16 fp32", "fp16 bf16", "bf16 fp16"])
def test_casts(dtypes, kernel):
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    source, target = (names[name] for name in dtypes.split())
    x = values(0).to(source)
    o = torch.empty(N, dtype=target)
    kernel[(1,)](x, o, N=N)
    assert_same(o, x.to(target))


def test_bf16_arithmetic():
    x, y = values(0).bfloat16(), values(1).flip(0).bfloat16()
    x[500:], y[500:] = torch.randn(N - 500).bfloat16(), torch.randn(N - 500).bfloat16()
    o = torch.empty(5, N, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, o, N=N)
    for got, want in zip(o, (x + y, x - y, x * y, torch.where(x < y, x, -y))):
        assert_same(got, want)
    numbers = ~(x.isnan() | y.isnan())
    assert_same(o[4][numbers], torch.maximum(x, y)[numbers])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dots_take_half_types_and_accumulate_in_fp32(dtype):
    x, y = (torch.randn(rows, 64).to(dtype) * 100 for rows in (32, 16))
    o = torch.empty(32, 16)
    _dot_kernel[(1,)](x, y, o, M=32, K=64, N=16)
    torch.testing.assert_close(o, x.float() @ y.float().t(), rtol=1e-5, atol=1e-1)


def test_loops_over_tensors():
    o = torch.zeros((), dtype=torch.int32)
    _range_kernel[(1,)](o, torch.tensor(4, dtype=torch.int32), torch.tensor(14, dtype=torch.int32))
    assert o.item() == 4 + 7 + 10 + 13


def test_kernels_refuse_bf16_in_an_interpreter_that_nobody_repaired(run_python):
    code = """
import torch
from gpt2fast import kernels
kernels.gelu(torch.ones(3))
try:
    kernels.gelu(torch.ones(3, dtype=torch.bfloat16))
except TypeError as error:
    print(error)
"""
    done = run_python("-c", code, env={"TRITON_INTERPRET": "1"}, check=True)
    assert "interpreter (TRITON_INTERPRET=1) computes bfloat16 wrongly: use float32" in done.stdout


def test_kernels_refuse_the_cpu_where_nothing_is_interpreted(run_python):
    code = """
import torch
from gpt2fast import kernels
try:
    kernels.attention(torch.ones(1, 4, 48), 1)
except ValueError as error:
    print(error)
"""
    done = run_python("-c", code, check=True)
    assert "attention: qkv is on the CPU, where Triton has no compiler: move it to a GPU" in done.stdout
