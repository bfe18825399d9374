"""GPT-2 as others write it, for benchmarks.peers and benchmarks.generate to compare ours with.

`Textbook` is plain PyTorch in the form that nanoGPT (github.com/karpathy/nanoGPT) made common: nn.Linear and
nn.LayerNorm, q, k and v split and transposed for scaled_dot_product_attention, all logits at once in fp32 for
F.cross_entropy. Nothing in it is slower than in nanoGPT. As there, the vocabulary is padded to a multiple of 64, and
the padding's logits are learned (ours count as minus infinity): at the start, when rows of weights are zero, the loss
is larger by 47 / 50257.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast.model import GPT, GPTConfig

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # in transformers, whose Conv1D is (in, out)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Textbook(nn.Module):
    """A model (tokens, targets) -> mean loss. Parameters have our names, plus the tied lm_head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def textbook(ours: GPT) -> Textbook:
    """Return the textbook's model with our weights."""
    model = Textbook(ours.config)
    model.load_state_dict(_weights(ours) | {"lm_head.weight": ours.wte.weight})
    return model


class HuggingFace(nn.Module):
    """transformers' GPT2LMHeadModel as (tokens, targets) -> mean loss, with SDPA and the padded vocabulary."""

    def __init__(self, config: GPTConfig, cache: bool = False):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        settings = GPT2Config(  # type: ignore[call-arg]  # transformers' types leave out what its base takes
            vocab_size=config.padded_vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0, use_cache=cache, tie_word_embeddings=True, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = GPT2LMHeadModel(settings)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        targets = targets.contiguous()
        return self.model(idx, labels=targets, shift_labels=targets).loss  # shifted already


def hugging_face(ours: GPT, cache: bool = False) -> HuggingFace:
    """Return transformers' model with our weights; `cache` turns on its cache of keys and values, for generating."""
    theirs = HuggingFace(ours.config, cache)
    names = {f"transformer.{name}": w.T if name.endswith(TRANSPOSED) else w for name, w in _weights(ours).items()}
    theirs.model.load_state_dict(names | {"lm_head.weight": ours.wte.weight})
    return theirs


def liger(ours: GPT) -> nn.Module:
    """Return transformers' GPT-2 with Liger's LayerNorm and linear + cross-entropy: Liger does not patch GPT-2."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerLayerNorm

    theirs = hugging_face(ours)
    body = theirs.model.transformer
    for parent in (body, *body.h):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.LayerNorm):
                new = LigerLayerNorm(norm.normalized_shape[0], eps=norm.eps)
                new.weight, new.bias = norm.weight, norm.bias
                setattr(parent, name, new)
    loss = LigerFusedLinearCrossEntropyLoss()

    def forward(idx: Tensor, targets: Tensor) -> Tensor:
        h = body(idx).last_hidden_state.flatten(0, 1)
        return loss(theirs.model.lm_head.weight, h, targets.flatten())

    theirs.forward = forward  # type: ignore[method-assign]
    return theirs


PEERS: dict[str, Callable[[GPT], nn.Module]] = {"textbook": textbook, "transformers": hugging_face, "liger": liger}


def _weights(ours: GPT) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in ours.named_parameters()}  # padded; a state_dict would hide the padding
