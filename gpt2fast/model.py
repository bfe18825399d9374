"""GPT-2, written once, in the seven names of `gpt2fast.ops.Ops`.

    x = wte[idx] + wpe[pos]
    for each block:  x = x + attention(layer_norm(x));  x = x + mlp(layer_norm(x))
    logits = layer_norm(x) wte^T

Radford et al. 2019: pre-LayerNorm (eps 1e-5), tanh-GELU, biases everywhere, learned positions, a final LayerNorm, a
head that shares the token embedding. No dropout: one epoch of pre-training needs no regularisation. Parameters have the
names of OpenAI's checkpoint; weights are (out, in), as in torch.nn.Linear.

The residual add and the LayerNorm after it are one op. So a block receives the residual stream x and its LayerNorm h,
and returns both for the next block: its last add_layer_norm uses the next block's ln_1, or ln_f.

Shapes: B batch, T positions, C = n_embd, H = n_head, V = vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2fast.errors import UserError
from gpt2fast.ops import Ops
from gpt2fast.reference import compute_dtype

Residual = Literal["fp32", "low"]  # low: autocast's dtype
Attend = Callable[[Tensor, int], Tensor]  # replaces ops.attention
VOCAB_SIZE = 50257
EPS = 1e-5
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of the model."""

    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Number of attention heads; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    block_size: int = 1024
    """Number of learned positions, the longest sequence."""
    vocab_size: int = VOCAB_SIZE
    """Number of tokens in the vocabulary."""

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: heads must have equal width"
            )

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 64 (50257 -> 50304): aligned rows on tensor cores save 10 to 25% of a
        step."""
        return -(-self.vocab_size // 64) * 64


SIZES = {
    "nano": GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=128),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class LayerNorm(nn.Module):
    """The weight and bias (C,), which an op applies."""

    def __init__(self, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n))


class Embedding(nn.Module):
    """The weight (n, C), whose rows an op looks up."""

    def __init__(self, n: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, n_embd))


class Linear(nn.Module):
    """The weight (out, in) and bias (out,), which an op applies."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.n_head = config.n_head
        self.ops = ops
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, h: Tensor, attend: Attend | None = None) -> Tensor:
        qkv = self.ops.linear(h, self.c_attn.weight, self.c_attn.bias)  # (B, T, 3C)
        o = (attend or self.ops.attention)(qkv, self.n_head)  # (B, T, C)
        return self.ops.linear(o, self.c_proj.weight, self.c_proj.bias)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h: Tensor) -> Tensor:
        return self.ops.mlp(h, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = Attention(config, ops)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor, h: Tensor, next_ln: LayerNorm, attend: Attend | None = None) -> tuple[Tensor, Tensor]:
        """Map the stream x and h = ln_1(x), both (B, T, C), to the new stream and next_ln of it."""
        add_layer_norm = self.ops.add_layer_norm
        x, h = add_layer_norm(x, self.attn(h, attend), self.ln_2.weight, self.ln_2.bias, EPS)
        return add_layer_norm(x, self.mlp(h), next_ln.weight, next_ln.bias, EPS)


class GPT(nn.Module):
    """GPT-2. `seed` fixes the initial weights, which are drawn on the CPU and are therefore equal on every device.

    The vocabulary is padded internally: rows of `wte.weight` from `vocab_size` on are zero and stay zero, and appear
    neither in logits nor in `state_dict`.

    `residual`: the dtype of the residual stream, all 2 n_layer + 1 sums of it: that of the weights, which are fp32, or
    autocast's ("low"). `recompute`: in training a block saves only its two inputs, and is computed again in backward.
    """

    def __init__(
        self, config: GPTConfig, ops: Ops, seed: int = 1337, *, residual: Residual = "fp32", recompute: bool = False
    ):
        super().__init__()
        self.config = config
        self.ops = ops
        self.residual = residual
        self.recompute = recompute
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        self.register_state_dict_post_hook(_hide_padding)
        self.register_load_state_dict_pre_hook(_add_padding)
        self._init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator) -> None:
        residual_std = INIT_STD * (2 * self.config.n_layer) ** -0.5  # 2 n_layer projections add up in the stream
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                drawn = weight[: self.config.vocab_size] if name == "wte.weight" else weight
                drawn.normal_(0.0, std, generator=generator)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V), or with targets (B, T) to the mean loss, fp32."""
        h = self.hidden(idx)
        if targets is None:
            return self.logits(h)
        return self.ops.linear_cross_entropy(
            h.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size
        )

    def hidden(self, idx: Tensor, wpe: Tensor | None = None, attends: Sequence[Attend | None] | None = None) -> Tensor:
        """Map tokens (B, T) to the final LayerNorm's output (B, T, C).

        For generation: `wpe` (T, C) are the embeddings of positions other than 0 to T - 1, and `attends` replaces
        ops.attention in each block.
        """
        wte, wpe = self.wte.weight, self.wpe.weight if wpe is None else wpe
        if len(wpe) < idx.shape[1]:
            raise UserError(f"a sequence of {idx.shape[1]} tokens is longer than block_size {len(wpe)}: shorten it")
        # each add_layer_norm keeps this dtype, since its sum has the dtype of x + y
        x = self.ops.embedding(wte, wpe, idx, compute_dtype(wte) if self.residual == "low" else wte.dtype)  # (B, T, C)
        blocks: list[Block] = list(self.h)  # type: ignore[arg-type]  # torch types ModuleList as Modules
        norms = [*(block.ln_1 for block in blocks), self.ln_f]
        h = self.ops.layer_norm(x, norms[0].weight, norms[0].bias, EPS)
        for block, next_ln, attend in zip(blocks, norms[1:], attends or [None] * len(blocks)):
            if self.recompute and torch.is_grad_enabled():
                # no random numbers are drawn in a block
                x, h = checkpoint(block, x, h, next_ln, use_reentrant=False, preserve_rng_state=False)
            else:
                x, h = block(x, h, next_ln, attend)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Map (..., C) to (..., V)."""
        return self.ops.linear(h, self.wte.weight)[..., : self.config.vocab_size]


def parameter_count(model: GPT) -> int:
    """Return the number of parameters as GPT-2 counts them: the tied head once, without the padding."""
    padding = model.config.padded_vocab_size - model.config.vocab_size
    return sum(p.numel() for p in model.parameters()) - padding * model.config.n_embd


def _hide_padding(model: GPT, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    key = prefix + "wte.weight"
    state_dict[key] = state_dict[key][: model.config.vocab_size]


def _add_padding(model: GPT, state_dict: dict, prefix: str, *_) -> None:
    key = prefix + "wte.weight"
    rows = model.config.padded_vocab_size - model.config.vocab_size
    if key in state_dict and len(state_dict[key]) == model.config.vocab_size:
        state_dict[key] = nn.functional.pad(state_dict[key], (0, 0, 0, rows))
