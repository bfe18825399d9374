"""Offsets beyond 2^31 elements, with little memory: in a process of their own, which an int32 offset makes crash.

Strided inputs take only address space (rows are 2^30 elements apart, and nothing in between is touched). A kernel over
contiguous rows runs one program near the end of a matrix of more than 2^31 elements, of which no other page exists. The
stride stays below 2^31, or Triton would pass it as int64 and hide the fault.
"""

import pytest

pytestmark = pytest.mark.kernel


ROW = """
import sys
import torch
from tests.tools import interpreter
interpreter.repair()
from gpt2fast.kernels import attention_decode, attention_forward, layernorm, loss, tanh_gelu

def rows(n, D, seed, dtype=torch.float16):
    "n rows of D random numbers, 2^30 elements apart"
    x = torch.empty((n - 1) * 2**30 + D, dtype=dtype).as_strided((n, D), (2**30, 1))
    x.copy_(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)))
    return x

def near(got, want):
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-3, atol=2e-3)

"""

STRIDED = {
    "attention": """
q, k, v, do = (rows(4, 16, seed)[None, None] for seed in range(4))
near_q, near_k, near_v, near_do = (x.contiguous() for x in (q, k, v, do))
a, b = attention_forward.flash_attention_fwd, attention_forward.flash_attention_bwd
o, lse = a(q, k, v, True, 0.25)
near(o, a(near_q, near_k, near_v, True, 0.25)[0])
for far, close in zip(b(do, q, k, v, o, lse, True, 0.25), b(near_do, near_q, near_k, near_v, o, lse, True, 0.25)):
    near(far, close)
""",
    "attention, batches and heads apart": """
q, k, v, do = (torch.empty(3 * 2**30 + 48, dtype=torch.float16)
    .as_strided((2, 2, 3, 16), (2**31 - 16, 2**30, 16, 1)) for seed in range(4))
for seed, x in enumerate((q, k, v, do)):
    x.copy_(torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(seed)))
near_q, near_k, near_v, near_do = (x.contiguous() for x in (q, k, v, do))
a, b = attention_forward.flash_attention_fwd, attention_forward.flash_attention_bwd
o, lse = a(q, k, v, True, 0.25)
near(o, a(near_q, near_k, near_v, True, 0.25)[0])
for far, close in zip(b(do, q, k, v, o, lse, True, 0.25), b(near_do, near_q, near_k, near_v, o, lse, True, 0.25)):
    near(far, close)
""",
    "cross-entropy": """
x, targets = rows(4, 40, 0), torch.tensor([3, 9, -100, 39])
near(loss.cross_entropy_fwd(x, targets, 40, -100), torch.nn.functional.cross_entropy(x.float(), targets))
want = loss.cross_entropy_fwd_grad(x.contiguous(), targets, 40, -100)
near(loss.cross_entropy_fwd_grad_(x, targets, 40, -100)[0], want[0])
near(x, want[1])
""",
}

CONTIGUOUS = {
    "gelu": """
n, BLOCK = 2**31 + 1024, 1024
x, o = torch.empty(n, dtype=torch.float16), torch.empty(n, dtype=torch.float16)
x[-1024:] = torch.randn(1024)
with interpreter.only_program(n // BLOCK - 1):
    tanh_gelu._gelu_fwd_kernel[(1,)](x_ptr=x, o_ptr=o, n=n, BLOCK=BLOCK)
want = torch.nn.functional.gelu(x[-1024:].float(), approximate="tanh")
near(o[-1024:], want)
with interpreter.only_program(n // BLOCK - 1):
    tanh_gelu._gelu_bwd_kernel[(1,)](do_ptr=x, x_ptr=x, dx_ptr=o, n=n, BLOCK=BLOCK)
leaf = x[-1024:].float().requires_grad_()
near(o[-1024:], torch.autograd.grad(torch.nn.functional.gelu(leaf, approximate="tanh"), leaf, x[-1024:].float())[0])
with interpreter.only_program(n // BLOCK - 1):
    loss._scale_kernel[(1,)](
        x_ptr=x, o_ptr=x, factor_ptr=torch.tensor(3.0), n=n, PROGRAMS=10**6, IN_PLACE=True, BLOCK=BLOCK)
near(torch.nn.functional.gelu(x[-1024:].float() / 3, approximate="tanh"), want)
""",
    "bias_gelu": """
M, N = 2**21 + 8, 1024
x, o, b = torch.empty(M, N, dtype=torch.float16), torch.empty(M, N, dtype=torch.float16), torch.randn(N).half()
x[-8:, -256:] = torch.randn(8, 256)
leaf, leaf_b = x[-8:, -256:].float().requires_grad_(), b[-256:].float().requires_grad_()
want = torch.nn.functional.gelu(leaf + leaf_b, approximate="tanh")
last = M // 8 * 4 - 1
with interpreter.only_program(last):
    tanh_gelu._bias_gelu_fwd_kernel[(1,)](x_ptr=x, b_ptr=b, o_ptr=o, M=M, N=N, BLOCK_M=8, BLOCK_N=256)
near(o[-8:, -256:], want)
db = torch.empty(M // 8, N)
with interpreter.only_program(last):
    tanh_gelu._bias_gelu_bwd_kernel[(1,)](
        do_ptr=x, x_ptr=x, b_ptr=b, dx_ptr=o, db_ptr=db, M=M, N=N, PARTS=M // 8, BLOCK_M=8, BLOCK_N=256)
dx, dleaf_b = torch.autograd.grad(want, [leaf, leaf_b], x[-8:, -256:].float())
near(o[-8:, -256:], dx)
near(db[-1, -256:], dleaf_b)
""",
    "attention to a cache": """
B, H, S, D = 2**20 + 1, 2, 16, 64
k, v, qkv, o = (torch.empty(B, *shape, dtype=torch.float16) for shape in ([H, S, D], [H, S, D], [3 * H * D], [H * D]))
position = torch.empty(B, dtype=torch.long)
position[-1] = 9
for x in (k, v, qkv):
    x[-1] = torch.randn(x.shape[1:])
from gpt2fast import reference
want = reference.cached_attention(qkv[-1:], k[-1:].clone(), v[-1:].clone(), position[-1:], H)
with interpreter.only_program(B * H - 1):
    attention_decode._cached_attention_kernel[(1,)](
        qkv_ptr=qkv, k_cache_ptr=k, v_cache_ptr=v, position_ptr=position, o_ptr=o, H=H, S=S, D=D,
        qk_scale=D**-0.5 * 1.4426950408889634, BLOCK_N=16, BLOCK_D=D, NUM_STAGES=1)
near(o[-1, D:], want[0, D:])
near(k[-1, 1, 9], qkv[-1, 3 * D : 4 * D])
""",
    "layer norm": """
M, N = 2**21 + 2, 1024
x, o, w = torch.empty(M, N, dtype=torch.float16), torch.empty(M, N, dtype=torch.float16), torch.randn(N)
x[-2:] = torch.randn(2, N)
mean, rstd = torch.empty(M), torch.empty(M)
leaf = x[-2:].float().requires_grad_()
want = torch.nn.functional.layer_norm(leaf, (N,), w, w)
kernel = layernorm._layer_norm_fwd_kernel
for y, s in ((None, None), (torch.empty_like(o), torch.empty_like(o))):
    if y is not None:
        y[-2:] = 0
    with interpreter.only_program(M // 2 - 1):
        kernel[(1,)](x_ptr=x, y_ptr=y, w_ptr=w, b_ptr=w, s_ptr=s, o_ptr=o, mean_ptr=mean, rstd_ptr=rstd, M=M, N=N,
                     eps=1e-5, HAS_RESIDUAL=y is not None, BLOCK_M=2, BLOCK_N=N)
    near(o[-2:], want)
dw, db = torch.empty(M // 2, N), torch.empty(M // 2, N)
with interpreter.only_program(M // 2 - 1):
    layernorm._layer_norm_bwd_kernel[(1,)](
        ds_ptr=None, do_ptr=x, s_ptr=x, w_ptr=w, dx_ptr=o, dy_ptr=None, dw_ptr=dw, db_ptr=db, mean_ptr=mean,
        rstd_ptr=rstd, M=M, N=N, PROGRAMS=M // 2, HAS_RESIDUAL=False, WRITE_DY=False, BLOCK_M=2, BLOCK_N=N,
        NUM_STAGES=1)
near(o[-2:], torch.autograd.grad(want, leaf, x[-2:].float())[0])
near(db[-1], x[-2:].float().sum(0))
""",
}


@pytest.mark.parametrize("kernel", STRIDED | CONTIGUOUS)
def test_beyond_2_31_elements(kernel, run_python):
    code = ROW + (STRIDED | CONTIGUOUS)[kernel]
    run_python("-c", code, env={"TRITON_INTERPRET": "1"}, check=True)


@pytest.mark.gpu
def test_a_head_whose_logits_are_more_than_2_31_elements(device):
    import torch

    from gpt2fast.kernels import cross_entropy

    logits = torch.randn(2, 50304, device=device, dtype=torch.bfloat16).repeat(22000, 1)  # 2.2e9 elements, 4.4 GB
    targets = torch.arange(44000, device=device) % 2 * 777
    want = torch.nn.functional.cross_entropy(logits[:2].float(), targets[:2])
    torch.testing.assert_close(cross_entropy(logits, targets), want, rtol=1e-4, atol=1e-4)
