"""The seven names for a CPU: torch's own operators, arranged for caches and memory, and specified by `reference`.

    embedding              the gradient of wte is sparse: the rows of the batch's tokens, which are added to the head's
    linear, mlp            y = x w^T + b;  dx = dy w,  dw = dy^T x,  db = sum dy
    attention              torch's flash attention forward, which also returns logsumexp. Backward, for a block of
                           queries and some heads at a time, so that scores stay in the cache:
                           p = exp(q k^T / sqrt(D) - logsumexp),  ds = p (do v^T - sum(do o)),
                           dv = p^T do,  dq = ds k / sqrt(D),  dk = ds^T q / sqrt(D)
    linear_cross_entropy   for a chunk of rows at a time: logits, softmax in place, minus one at the target, which is
                           their gradient; then dx and dw. Logits are never in fp32.

Saves      linear: x and w in the compute dtype;  attention: qkv, o, logsumexp;  linear_cross_entropy: dx, dw.
Numerics   As under autocast: products accumulate in fp32 and are rounded to the compute dtype; attention's backward
           keeps scores, do v^T and p in fp32, which torch's does too; the loss is fp32.
Why        benchmarks/NOTES.md measures what each of torch's own operators loses here.
Sources    As in `reference`; recomputed scores: Dao et al. 2022, arXiv:2205.14135, algorithm 4.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gpt2fast import reference
from gpt2fast.reference import IGNORE, compute_dtype

# Tuned on one machine: two cores of an Intel Xeon with AMX, torch 2.15 (benchmarks/NOTES.md). They choose between ways
# to the same result by speed: on another machine they may cost time, never correctness.
ROWS = 1024  # rows of logits in a chunk: 103 MB of bf16 with GPT-2's vocabulary
QUERIES = 128  # queries in a block of attention's backward
SCORES = 2**20  # scores in such a block: 4 MB of fp32, the L2 of two cores
LONGEST = 512  # the longest sequence for which this backward is faster than torch's
FEW = 64  # rows up to which a bf16 product is faster transposed: 18 -> 13 ms for all of GPT-2 124M's at B=8
TALL, LARGE = 2, 1536  # oneDNN uses one thread for a bf16 product if N <= M < TALL * N and M <= LARGE
# also measured there: an autograd Function costs 25 us, 1.2 ms for a token of GPT-2 124M (see linear)

# Numerics, the same everywhere
SAMPLES = 64  # columns of the logits from which the target's log p is computed
TINY = 1e-30  # bf16 probabilities below this may have lost bits

layer_norm = reference.layer_norm
add_layer_norm = reference.add_layer_norm
cached_attention = reference.cached_attention


def embedding(wte: Tensor, wpe: Tensor, idx: Tensor, dtype: torch.dtype) -> Tensor:
    """Add token and position embeddings: (V, C), (block_size, C), (B, T) int64 -> (B, T, C) in `dtype`."""
    # a dense gradient would be a second matrix of V rows, cleared and added; torch.compile supports no sparse one
    x = F.embedding(idx, wte, sparse=not torch.compiler.is_compiling())
    return (x + wpe[: idx.shape[1]]).to(dtype)


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """Apply causal attention to packed projections: (B, T, 3C) -> (B, T, C), heads of D = C / n_head side by side."""
    return _Attention.apply(qkv.to(compute_dtype(qkv)), n_head)


def mlp(x: Tensor, fc_w: Tensor, fc_b: Tensor, proj_w: Tensor, proj_b: Tensor) -> Tensor:
    """Apply linear, tanh-GELU, linear: (..., C), (F, C), (F,), (C, F), (C,) -> (..., C)."""
    return linear(_gelu(linear(x, fc_w, fc_b)), proj_w, proj_b)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute x w^T + b: (..., I), (O, I), (O,) -> (..., O)."""
    if not torch.is_grad_enabled():  # an autograd Function would be overhead, which generation notices
        return _product(x, w, b, compute_dtype(x))[0]
    return _Linear.apply(x, w, b, compute_dtype(x))


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int | None = None) -> Tensor:
    """Return the mean loss, fp32: (N, C), (V, C), (N,) int64 -> (). Rows of `w` from `vocab_size` on are padding."""
    gradients = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return _LinearCrossEntropy.apply(x, w, targets, vocab_size or w.shape[0], compute_dtype(x), gradients)


def _gelu(x: Tensor) -> Tensor:
    """Compute tanh-GELU; under torch.compile as x sigmoid(2u): its vectorised tanh is 3 times slower than its exp."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    y = x.to(_statistics_dtype(x))
    two_u = math.sqrt(8 / math.pi) * y * (1 + 0.044715 * y * y)
    return (y * torch.sigmoid(two_u)).to(x.dtype)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)  # float64 stays, for tests


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a b + bias: (M, K), (K, N), (N,) -> (M, N).

    oneDNN splits the output of a bf16 product over threads if it is wider than tall, very tall, or large. A product
    between these (1024 x 768: all of GPT-2 124M's at B=4, T=256) is cut into two that are wider than tall, which is 1.8
    times as fast on two cores. A product with few rows, as in generation, is faster transposed.
    """
    product = torch.mm if bias is None else lambda rows, b, **out: torch.addmm(bias, rows, b, **out)
    M, N = a.shape[0], b.shape[1]
    if a.dtype == torch.bfloat16 and 1 < M <= FEW and not torch.compiler.is_compiling():
        y = torch.mm(b.t(), a.t()) if bias is None else torch.addmm(bias[:, None], b.t(), a.t())
        return y.t().contiguous()  # torch's attention assumes contiguous rows
    if a.dtype != torch.bfloat16 or not N <= M < TALL * N or M > LARGE:
        return product(a, b)
    if torch.compiler.is_compiling():
        return torch.cat([product(rows, b) for rows in a.chunk(2)])
    y = a.new_empty(M, N)
    for rows, part in zip(a.chunk(2), y.chunk(2)):
        product(rows, b, out=part)
    return y


def _product(x: Tensor, w: Tensor, b: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x w^T + b, and its operands x, as a matrix, and w in `dtype`."""
    rows, w = x.reshape(-1, x.shape[-1]).to(dtype), w.to(dtype)
    y = _matmul(rows, w.t(), None if b is None else b.to(dtype))
    return y.view(*x.shape[:-1], w.shape[0]), rows, w


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, w, b, dtype):
        ctx.like = x.shape, x.dtype, w.dtype, None if b is None else b.dtype
        y, x, w = _product(x, w, b, dtype)
        ctx.save_for_backward(x, w)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, w), (shape, x_dtype, w_dtype, b_dtype) = ctx.saved_tensors, ctx.like
        dy = dy.reshape(-1, dy.shape[-1])
        dx = _matmul(dy, w).view(shape).to(x_dtype) if ctx.needs_input_grad[0] else None
        dw = torch.mm(dy.t(), x).to(w_dtype) if ctx.needs_input_grad[1] else None
        db = dy.sum(0).to(b_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None


class _Attention(Function):
    @staticmethod
    def forward(ctx, qkv, n_head):
        (B, T, C3), D = qkv.shape, qkv.shape[-1] // (3 * n_head)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads(qkv, 3, D), is_causal=True)
        o = o.transpose(1, 2).reshape(B, T, C3 // 3)
        ctx.save_for_backward(qkv, o, lse)
        ctx.n_head = n_head
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        qkv, o, lse = ctx.saved_tensors
        if qkv.shape[1] <= LONGEST:
            return _attention_bwd(do, qkv, o, lse, ctx.n_head), None
        D = o.shape[-1] // ctx.n_head
        (do,), (o,), (q, k, v) = _heads(do, 1, D), _heads(o, 1, D), _heads(qkv, 3, D)
        d = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, True)
        return torch.stack(d).permute(1, 3, 0, 2, 4).reshape(qkv.shape), None


@library.custom_op("gpt2fast_cpu::attention_bwd", mutates_args=())
def _attention_bwd(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, n_head: int) -> Tensor:
    """Return dqkv: (B, T, C), (B, T, 3C), (B, T, C), (B, H, T) -> (B, T, 3C). An operator, so that its loops are not
    unrolled by a compiler."""
    (B, T, C), H = o.shape, n_head
    D, dtype = C // H, _statistics_dtype(qkv)
    scale = 1 / math.sqrt(D)
    q, k, v = _heads(qkv, 3, D).reshape(3, B * H, T, D)
    do, o = (_heads(x, 1, D).reshape(B * H, T, D) for x in (do, o))
    q_, k_, v_, do_ = (x.to(dtype) for x in (q, k, v, do))
    minus_lse, minus_delta = -lse.reshape(B * H, T, 1), -(do_ * o).sum(-1, keepdim=True)
    d = qkv.new_zeros(3, B * H, T, D)
    heads = max(1, SCORES // (QUERIES * T))
    for start in range(0, B * H, heads):
        h = slice(start, start + heads)
        for begin in range(0, T, QUERIES):
            end = min(T, begin + QUERIES)
            rows, keys = slice(begin, end), slice(0, end)
            with _bf16_products(qkv.dtype):
                s = torch.bmm(q_[h, rows], k_[h, keys].mT)  # (heads, queries, keys)
                dp = torch.bmm(do_[h, rows], v_[h, keys].mT)
            # torch's exp is 100 times slower where its result is denormal or infinite
            p = torch.add(minus_lse[h, rows], s, alpha=scale, out=s).clamp_(-87, 1).exp_()
            ds = dp.add_(minus_delta[h, rows]).mul_(p).to(qkv.dtype).tril_(begin)  # causal mask
            p = p.to(qkv.dtype).tril_(begin)
            d[0, h, rows].baddbmm_(ds, k[h, keys], alpha=scale)
            d[1, h, keys].baddbmm_(ds.mT, q[h, rows], alpha=scale)
            d[2, h, keys].baddbmm_(p.mT, do[h, rows])
    dqkv = torch.empty_like(qkv)
    _heads(dqkv, 3, D).copy_(d.view(3, B, H, T, D))
    return dqkv


@_attention_bwd.register_fake
def _(do, qkv, o, lse, n_head):
    return torch.empty_like(qkv)


@contextmanager
def _bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 products round operands to bf16 if `dtype` is bf16: the operands are bf16 values stored in fp32, so
    products stay exact, and are twice as fast."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # not in torch's types
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _heads(packed: Tensor, n: int, D: int) -> Tensor:
    """Return a view: (B, T, n H D) -> (n, B, H, T, D)."""
    B, T, nHD = packed.shape
    return packed.view(B, T, n, nHD // (n * D), D).permute(2, 0, 3, 1, 4)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, w, targets, vocab_size, dtype, gradients):
        loss, dx, dw = _linear_cross_entropy(x.to(dtype), w.to(dtype), targets, vocab_size, gradients)
        ctx.save_for_backward(dx, dw, targets)
        ctx.dtypes = x.dtype, w.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dw, targets = ctx.saved_tensors
        scale = dloss / (targets != IGNORE).sum().clamp(min=1)
        return *(_scaled(d, scale, dtype) for d, dtype in zip((dx, dw), ctx.dtypes)), None, None, None, None


@library.custom_op("gpt2fast_cpu::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, vocab_size: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss, and dx and dw of the sum of losses (empty without `gradients`): (N, C), (V, C) of one
    dtype, (N,) -> (), (N, C), (V, C)."""
    counted = targets != IGNORE
    loss = x.new_zeros((), dtype=_statistics_dtype(x))
    dx, dw = (torch.empty_like(x), w.new_empty(0)) if gradients else (x.new_empty(0), w.new_empty(0))
    with torch.autocast("cpu", enabled=False):  # it would compute softmax in fp32
        for i, rows in enumerate(x.split(ROWS)):
            chunk = slice(i * ROWS, i * ROWS + len(rows))
            losses, p = _cross_entropy(rows, w, targets[chunk].where(counted[chunk], 0), vocab_size)
            loss += losses.where(counted[chunk], 0).sum()
            if gradients:
                if not counted[chunk].all():
                    p.mul_(counted[chunk, None])
                dx[chunk] = _matmul(p, w)
                part = torch.mm(p.t(), rows)
                dw = part if len(x) <= ROWS else part.to(loss.dtype) if i == 0 else dw.add_(part)
    return loss / counted.sum(), dx, dw


@_linear_cross_entropy.register_fake
def _(x, w, targets, vocab_size, gradients):
    dtype = _statistics_dtype(x)
    dx, dw = (torch.empty_like(x), torch.empty_like(w)) if gradients else (x.new_empty(0), w.new_empty(0))
    return x.new_empty((), dtype=dtype), dx, dw if len(x) <= ROWS else dw.to(dtype)


def _cross_entropy(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return losses (M,) in fp32, and their gradients with respect to the logits (M, V): (M, C), (V, C), (M,).

    torch has no operator that returns softmax and logsumexp, and one that returns either reads and writes all logits.
    But the target's log p is that of any column plus the difference of their logits; an average over SAMPLES columns
    reduces the rounding of p (2^-9 in bf16). logsumexp is as large as a logit and has as large a rounding.
    """
    logits = torch.mm(x, w.t())
    logits[:, vocab_size:] = -math.inf
    dtype = _statistics_dtype(x)
    columns = slice(0, vocab_size, max(1, vocab_size // SAMPLES))
    some = logits[:, columns].to(dtype, copy=True)  # before softmax overwrites them
    target = logits.gather(1, targets[:, None])[:, 0].to(dtype)
    p = torch.softmax(logits, -1, out=logits)
    some_p = p[:, columns].to(dtype)
    if (some_p > TINY).all():
        log_p = (target[:, None] - some + some_p.log()).mean(1)
    else:  # a sampled probability is nearly zero, or NaN
        log_p = torch.mm(x, w[:vocab_size].t()).to(dtype).log_softmax(1).gather(1, targets[:, None])[:, 0]
    p[torch.arange(len(p)), targets] = torch.expm1(log_p).to(p.dtype)  # scatter_ would copy all of p
    return -log_p, p


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x * scale in `dtype`; in eager mode a megabyte at a time, as torch first converts and then multiplies."""
    if torch.compiler.is_compiling():
        return (x.to(_statistics_dtype(x)) * scale).to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    for to, part in zip(y.split(ROWS), x.split(ROWS)):
        to.copy_(part).mul_(scale)
    return y
