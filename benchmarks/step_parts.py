"""Count what a training step multiplies and moves, part by part, from its shapes.

`flops` and `bytes` are those of an ideal step: matmuls read and write while they compute, everything that can be fused
is fused, nothing passes over memory twice. `our_flops` and `our_bytes` are those of our compiled step with its options
on or off.

    M = B T tokens;  sweep = 2 M C bytes, once over a bf16 [M, C];  P parameters, W of them in the blocks' matrices
"""

from dataclasses import dataclass
from typing import NamedTuple

from gpt2fast.model import GPTConfig
from gpt2fast.training import flops

# As in kernels/, which imports Triton, and this must run without it: launch.py's budget for the head's logits, and the
# rows of attention's tiles, which are computed whole on the diagonal.
HEAD_BYTES, HEAD_SHARE, TILE = 2**30, 16, 128


MEMORY = 150e9  # bytes: room for all of the head's logits in one chunk


@dataclass(frozen=True)
class Options:
    """The options of our step that change what it multiplies or moves."""

    residual: bool = False  # the residual stream in bf16
    epilogue: bool = False  # GELU in the matmuls' epilogues
    embedding: bool = False  # the embedding's gradient by our kernel, with the positions'
    one_pass: bool = True  # attention backward as one kernel with 5 matmuls, as for 124M on an H200; else two, with 7
    adamw: bool = False  # AdamW by our kernel, which also writes the weights' bf16 copies
    recompute: bool = False  # activation checkpointing


ALL = Options(residual=True, epilogue=True, embedding=True, adamw=True)


class Part(NamedTuple):
    """A part of the step, ideally and as we compute it."""

    name: str
    group: str  # as in a profile
    flops: float
    bytes: float
    our_flops: float
    our_bytes: float


def parts(config: GPTConfig, B: int, T: int, ours: Options = ALL, memory: float = MEMORY) -> list[Part]:
    """Return the parts of one step of bf16 training, on a device with `memory` bytes."""
    L, C, V = config.n_layer, config.n_embd, config.padded_vocab_size
    M, P = B * T, flops.parameters(config) + (config.padded_vocab_size - config.vocab_size) * C
    W = 12 * L * C * C
    sweep = 2 * M * C
    stream = sweep if ours.residual else 2 * sweep
    forward = 2 if ours.recompute else 1  # times that a block runs forward
    found = []

    def add(name: str, group: str, ideal: tuple[float, float], own: tuple[float, float]) -> None:
        found.append(Part(name, group, *ideal, *own))

    for name, width in (("qkv", 3), ("attention projection", 1), ("fc", 4), ("mlp projection", 4)):
        product = 2 * M * width * C * C * L
        add(name, "matmul", (3 * product, 0), ((2 + forward) * product, 0))
    add("head", "matmul", (6 * M * C * V, 0), (6 * M * C * V, 0))
    scores = 2 * M * T * C * L  # q k^T and p v, half of each: causal
    whole = scores * (1 + min(TILE, T) / T)
    add("attention forward", "attention", (scores, 0), (forward * whole, 0))
    add("attention backward", "attention", (2.5 * scores, 0), ((2.5 if ours.one_pass else 3.5) * whole, 0))
    add("attention's delta", "attention", (0, 2 * sweep * L), (0, 2 * sweep * L))
    # forward: x, y read, s, o written; backward: do, s, the stream's gradient read, dx written, dy if its dtype differs
    add("add + LayerNorm forward", "layer norm", (0, 8 * sweep * L), (0, forward * 2 * L * (2 * stream + 2 * sweep)))
    dy = 0 if ours.residual else sweep
    add(
        "LayerNorm backward", "layer norm",
        (0, 4 * sweep * (2 * L + 1)), (0, (2 * L + 1) * (3 * stream + sweep + dy) - 2 * stream),
    )  # fmt: skip
    add("first LayerNorm, alone", "layer norm", (0, 0), (0, stream + sweep))
    add("first LayerNorm's gradient added", "elementwise", (0, 0), (0, 3 * stream))
    gelu = 0 if ours.epilogue else sweep * L
    add("GELU forward", "gelu", (0, 0), (0, forward * 8 * gelu))
    add("GELU backward", "gelu", (0, 0), (0, 12 * gelu))
    add("bias gradients of the projections", "elementwise", (0, 0), (0, 5 * sweep * L))
    add("cross-entropy", "cross-entropy", (0, 4 * M * V), (0, 4 * M * V))
    add("head's gradients scaled", "cross-entropy", (0, 0), (0, 2 * sweep + 8 * V * C))
    chunks = -(-2 * M * V // max(HEAD_BYTES, int(memory) // HEAD_SHARE))
    add("head's dw summed over chunks", "elementwise", (0, 0), (0, (10 * (chunks - 1) + 6) * V * C))
    add("head's dw and the embedding's added", "elementwise", (0, 0), (0, 12 * V * C))
    # ideally with the first LayerNorm: rows read in fp32, x and o written; dx read once, gradients of the rows added
    rows = min(M, V)
    gather = 2 * sweep + stream
    # dx is read again for the positions; ours then writes zeros and sums, Inductor zeros and atomic additions
    scatter = 2 * stream + 4 * V * C + (4 * rows * C if ours.embedding else 4 * M * C)
    add("embedding", "embedding", (0, 5 * sweep + 8 * rows * C), (0, gather + scatter))
    copied = W if ours.adamw else 0  # parameters whose bf16 copy AdamW writes, and whose gradient is bf16
    add("AdamW", "optimizer", (0, 30 * P), (0, 28 * P))
    add("gradient norm", "optimizer", (0, 4 * P), (0, 4 * P - 2 * copied))
    add("weights to bf16, gradients back", "copy", (0, 0), (0, 12 * (W - copied) + 6 * V * C))
    return found
