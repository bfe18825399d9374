"""The launches that benchmarks.aot compiles: our ops at GPT-2's shapes, called on CPU tensors that no one touches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import gpt2fast.kernels.epilogue  # noqa: F401  # registers two ops more than gpt2fast.kernels does
from gpt2fast.kernels import ParameterTable, adamw_, gradient_norm

ops = torch.ops.gpt2fast


@dataclass(frozen=True)
class Case:
    """`call` makes the launches; kernels whose names contain one of `tensor_cores` must do every tl.dot on them."""

    call: Callable[[], object]
    tensor_cores: tuple[str, ...] = ()


def _attention(C: int, H: int, dtype: torch.dtype, B: int = 64) -> None:
    qkv, o, lse = torch.empty(B, T, 3 * C, dtype=dtype), torch.empty(B, T, C, dtype=dtype), torch.empty(B, H, T)
    ops.attention_fwd(qkv, H, 0.125)
    ops.attention_bwd(o, qkv, o, lse, H, 0.125)


def _attention_tf32(C: int, H: int) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        _attention(C, H, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")


def _decoding(C: int, H: int, dtype: torch.dtype) -> None:
    qkv, cache = torch.empty(8, 3 * C, dtype=dtype), torch.empty(8, H, T, C // H, dtype=dtype)
    ops.cached_attention_(qkv, cache, cache, torch.zeros(8, dtype=torch.long), H)


def _embedding(C: int, stream: torch.dtype) -> None:
    wte, wpe, idx = torch.empty(V, C), torch.empty(T, C), torch.zeros(B, T, dtype=torch.long)
    ops.embedding_bwd(ops.embedding_fwd(wte, wpe, idx, stream), idx, V, T, torch.float32)


def _layer_norm(C: int, stream: torch.dtype) -> None:
    """Call as under bf16 autocast does: the stream in its own dtype, branches in bf16, weights in fp32."""
    x, y, w = torch.empty(B * T, C, dtype=stream), torch.empty(B * T, C, dtype=torch.bfloat16), torch.empty(C)
    mean = torch.empty(B * T)
    ops.layer_norm_fwd(x, w, w, 1e-5, torch.bfloat16)
    ops.layer_norm_bwd(y, x, w, mean, mean)
    ops.add_layer_norm_fwd(x, y, w, w, 1e-5, torch.bfloat16)
    ops.add_layer_norm_bwd(x, y, x, w, mean, mean, torch.bfloat16)


def _gelu(C: int) -> None:
    x, b = torch.empty(B * T, 4 * C, dtype=torch.bfloat16), torch.empty(4 * C, dtype=torch.bfloat16)
    ops.gelu_fwd(x)
    ops.gelu_bwd(x, x)
    ops.bias_gelu_fwd(x, b)
    ops.bias_gelu_bwd(x, x, b)


def _epilogue(C: int, dtype: torch.dtype) -> None:
    x, w = torch.empty(B * T, C, dtype=dtype), torch.empty(4 * C, C, dtype=dtype)
    h, _ = ops.linear_gelu_fwd(x, w, torch.empty(4 * C, dtype=dtype))
    ops.linear_gelu_bwd(x, w.view(C, 4 * C), h)


def _cross_entropy() -> None:
    """Call with a chunk of the head's logits."""
    x, targets = torch.empty(9472, V, dtype=torch.bfloat16), torch.zeros(9472, dtype=torch.long)
    ops.cross_entropy_fwd(x, targets, 50257, -100)
    ops.cross_entropy_fwd_grad_(x, targets, 50257, -100)
    ops.scale_(x, torch.empty(()))
    ops.scaled(torch.empty(V, 768), torch.empty(()), torch.float32)


def _adamw(C: int) -> None:
    """Call with a matrix and its copy, an embedding and a bias: the kernel learns which they are at run time."""
    table, half = ParameterTable(torch.device("cpu")), torch.empty(4 * C, C, dtype=torch.bfloat16)
    one = torch.ones(())
    matrix, embedding, bias = torch.empty(4 * C, C), torch.empty(V, C), torch.empty(C)
    table.refresh([(half, *[matrix] * 3, half, one), (*[embedding] * 4, None, one), (*[bias] * 4, None, one)])
    table.set_numbers(torch.zeros(3, 7))
    gradient_norm(table)
    adamw_(table, one)


B, T, V = 64, 1024, 50304
WIDTHS = {"124M": (768, 12), "355M": (1024, 16), "774M": (1280, 20), "1.5B": (1600, 25)}  # C, H
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = {"124M attention bf16": Case(partial(_attention, 768, 12, torch.bfloat16), ("attention",))}
few = partial(_attention, 768, 12, torch.bfloat16, B=4)  # with few heads, backward is two kernels instead of one
CASES |= {"124M attention bf16, B=4": Case(few, ("attention",))}
CASES |= {"1.5B attention bf16": Case(partial(_attention, 1600, 25, torch.bfloat16), ("attention",))}
CASES |= {"124M attention fp32": Case(partial(_attention, 768, 12, torch.float32))}  # exact: no tensor cores
CASES |= {"124M attention tf32": Case(partial(_attention_tf32, 768, 12), ("attention",))}
CASES |= {f"124M decoding {name}": Case(partial(_decoding, 768, 12, DTYPES[name])) for name in DTYPES}
CASES |= {
    f"{size} layer norm, {name} stream": Case(partial(_layer_norm, WIDTHS[size][0], DTYPES[name]))
    for size in WIDTHS
    for name in DTYPES
}
CASES |= {
    f"{size} embedding, {name} stream": Case(partial(_embedding, WIDTHS[size][0], DTYPES[name]))
    for size in ("124M", "1.5B")
    for name in DTYPES
}
CASES |= {f"{size} gelu": Case(partial(_gelu, WIDTHS[size][0])) for size in ("124M", "1.5B")}
CASES |= {
    f"{size} epilogue bf16": Case(partial(_epilogue, WIDTHS[size][0], torch.bfloat16), ("linear_gelu",))
    for size in ("124M", "1.5B")
}
CASES |= {"124M epilogue fp32": Case(partial(_epilogue, 768, torch.float32))}  # exact: no tensor cores
CASES |= {"124M cross-entropy": Case(_cross_entropy)}
CASES |= {"124M adamw": Case(partial(_adamw, 768))}
