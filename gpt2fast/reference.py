"""The seven names in plain PyTorch: the specification, the yardstick and the baseline.

    x = wte[idx] + wpe[position]                                                   embedding
    s = x + y;  z = (s - mean(s)) / sqrt(var(s) + eps);  o = z * w + b             layer_norm, add_layer_norm
    o = softmax(q k^T / sqrt(D) + causal mask) v                                   attention
    k_cache[p], v_cache[p] = k, v;  o = softmax(q k_cache[:p + 1]^T / sqrt(D)) v_cache[:p + 1]    cached_attention
    o = gelu_tanh(x fc_w^T + fc_b) proj_w^T + proj_b                               mlp
    loss = mean_i(logsumexp_v(x_i . w_v) - x_i . w_target(i))                      linear_cross_entropy

`gpt2fast.ops.Ops` states the dtype of each result. Every other implementation is tested against this file.

Sources: Radford et al. 2019 (GPT-2); Ba et al. 2016, arXiv:1607.06450 (LayerNorm); Hendrycks & Gimpel 2016,
arXiv:1606.08415 (GELU and its tanh form); Vaswani et al. 2017, arXiv:1706.03762 (attention).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that counts neither in the sum of losses nor in the mean's divisor, as in torch


def embedding(wte: Tensor, wpe: Tensor, idx: Tensor, dtype: torch.dtype) -> Tensor:
    """Add token and position embeddings: (V, C), (block_size, C), (B, T) int64 -> (B, T, C) in `dtype`."""
    return (F.embedding(idx, wte) + wpe[: idx.shape[1]]).to(dtype)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension: (..., C), (C,), (C,) -> (..., C)."""
    return F.layer_norm(x, w.shape, w, b, eps).to(compute_dtype(x))


def add_layer_norm(x: Tensor, y: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise: x, y (..., C) -> x + y and layer_norm(x + y)."""
    s = x + y
    return s, layer_norm(s, w, b, eps)


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """Apply causal attention to packed projections: (B, T, 3C) -> (B, T, C), heads of D = C / n_head side by side."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return o.transpose(1, 2).reshape(B, T, C3 // 3)


def cached_attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, n_head: int) -> Tensor:
    """Attend with one new token per row: qkv (B, 3C), position (B,) int64 -> (B, C).

    Its key and value are written to the caches (B, H, S, D), which have the compute dtype. Entries after `position`
    have no effect if they are finite.
    """
    B, C3 = qkv.shape
    q, k, v = qkv.view(B, 3, n_head, 1, C3 // (3 * n_head)).to(k_cache.dtype).unbind(1)  # each (B, H, 1, D)
    rows, places = torch.arange(B, device=qkv.device), torch.arange(k_cache.shape[2], device=qkv.device)
    k_cache[rows, :, position], v_cache[rows, :, position] = k[:, :, 0], v[:, :, 0]
    seen = (places <= position[:, None])[:, None, None]  # (B, 1, 1, S)
    return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=seen).view(B, C3 // 3)


def mlp(x: Tensor, fc_w: Tensor, fc_b: Tensor, proj_w: Tensor, proj_b: Tensor) -> Tensor:
    """Apply linear, tanh-GELU, linear: (..., C), (F, C), (F,), (C, F), (C,) -> (..., C)."""
    return F.linear(F.gelu(F.linear(x, fc_w, fc_b), approximate="tanh"), proj_w, proj_b)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute x w^T + b: (..., I), (O, I), (O,) -> (..., O)."""
    return F.linear(x, w, b)


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int | None = None) -> Tensor:
    """Return the mean loss of the tied head: (N, C), (V, C), (N,) int64 -> (), fp32.

    Rows of `w` from `vocab_size` on are padding. Their logits are minus infinity, so that their probability and
    gradient are exactly zero. The matmul's bias makes them so, which its epilogue adds for free; slicing the logits
    would copy all of them, in forward and in backward.
    """
    logits = F.linear(x, w, _padding_bias(w, vocab_size, x))  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float64 stays: it is the truth in tests
    return F.cross_entropy(logits, targets, ignore_index=IGNORE)


def _padding_bias(w: Tensor, vocab_size: int | None, x: Tensor) -> Tensor | None:
    if vocab_size is None or vocab_size == w.shape[0]:
        return None
    bias = torch.zeros(w.shape[0], dtype=compute_dtype(x), device=w.device)
    bias[vocab_size:] = float("-inf")
    return bias


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matmuls run in: autocast's if it is on for x's device, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
