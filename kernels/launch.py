"""The block sizes, warps and stages of every kernel: pure functions of shape, dtype and device capability.

The interpreter gets the half types' tiles of sm_90, so that tests without a GPU walk the same ones; but elementwise
kernels, and those that walk a row, get larger blocks, since the interpreter's cost is per operation. `benchmarks.aot`
checks these settings: it compiles every launch at GPT-2's shapes for sm_80 to sm_120, and none may spill or exceed the
card's shared memory. Other shapes run, but some spill (benchmarks/results/aot_other_shapes.jsonl): LayerNorm's backward
beyond 8192 columns, or beyond 4096 if not a multiple of 16; heads of 80 to 96 on sm_80 and sm_100; dq of fp32 heads
beyond 128.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as triton.jit does when it decorates
INTERPRETER = (9, 0)  # the capability whose tiles it gets
WARP = 32
HEAD_BYTES = 2**30  # the least size of a chunk of logits: enough rows to fill a GPU many times over
HEAD_SHARE = 16  # a chunk may take 1/16 of the device's memory: B=64, T=1024 (6.6 GB) is one with 140 GB, two with 80


class Tiles(NamedTuple):
    """The settings of attention: queries and keys per tile, warps, stages of the software pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class MatmulTiles(NamedTuple):
    """The settings of a matrix product: a tile, parts in which its columns are finished, warps, pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PIECES: int
    num_warps: int
    num_stages: int


class Keys(NamedTuple):
    """The settings of attention to a cache: keys per iteration, warps, iterations prefetched."""

    BLOCK_N: int
    num_warps: int
    NUM_STAGES: int


class Chunk(NamedTuple):
    """The settings of AdamW: elements per program, elements per iteration, warps."""

    CHUNK: int
    BLOCK: int
    num_warps: int


class Rows(NamedTuple):
    """The settings of kernels over the rows of a matrix: rows and columns of a tile, warps."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability: (9, 0) for sm_90."""
    if device.type == "cpu":
        return INTERPRETER
    return torch.get_device_module(device).get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; few for the interpreter, so that persistent programs iterate."""
    if device.type == "cpu":
        return 2
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


@functools.cache
def l2_cache(device: torch.device) -> int:
    """Return the bytes of L2; for the interpreter those of sm_90."""
    if device.type == "cpu":
        return 50 << 20
    return torch.get_device_module(device).get_device_properties(device).L2_cache_size


@functools.cache
def memory(device: torch.device) -> int:
    """Return the bytes of the device's memory; 0 for the interpreter, which thus gets the smallest chunks."""
    if device.type == "cpu":
        return 0
    return torch.get_device_module(device).get_device_properties(device).total_memory


def elementwise() -> int:
    """Return the elements per program: 8 per thread, 16 bytes of a half type, at 4 warps."""
    return 2**16 if INTERPRETED else 1024


def adamw_chunk(norm: bool = False) -> Chunk:
    """Return the settings of the update, or of the norm. Looking up a tensor's addresses takes two dependent loads: a
    small part of the two to eight iterations that follow. Four elements per thread, so that no fp32 moves between
    threads before it is stored; the norm stores nothing, and has 4 kB in flight in each program."""
    if INTERPRETED:
        return Chunk(2**15, 2**14, 4)
    return Chunk(4096, 2048, 4) if norm else Chunk(4096, 512, 4)


def elementwise_rows() -> Rows:
    """Return the tile of an elementwise kernel over a matrix: bias and GELU, embedding. Its columns divide 4 C of every
    GPT-2, 6400 of XL among them."""
    return Rows(256, 256, 4) if INTERPRETED else Rows(8, 256, 4)


def layer_norm_rows(N: int, backward: bool) -> Rows:
    """Return a tile of whole rows, 16 elements per thread; fewer rows in backward, where five such arrays are live."""
    block_n = triton.next_power_of_2(N)
    block_m = max(1, (2048 if backward else 4096) // block_n)
    return Rows(block_m, block_n, min(32, max(1, block_m * block_n // (WARP * 16))))


# Backward has 4 programs on a processor, each with a tile of 12 kB: twice the bytes in flight that sm_90's memory needs
# (Little's law), but none while they sum, unless the next tile is already in flight.
LAYER_NORM_STAGES = 2


def persistent(tiles: int, device: torch.device, per_processor: int = 4) -> int:
    """Return the size of a persistent grid: enough to fill the device, and never more than there are tiles."""
    return max(1, min(tiles, per_processor * processors(device)))


def embedding_batch(B: int) -> Rows:
    """Return the tile of dwpe: sequences that are added at a time, and elements of (T, C)."""
    return Rows(min(16, triton.next_power_of_2(B)), 2**14 if INTERPRETED else 256, 4)


def embedding_bucket(long: bool) -> Rows:
    """Return the tile of one token's positions: few in one warp, so that many tokens are in flight; if `long`, 8 or
    16 kB in flight. 16 numbers per thread, since int64 takes two registers for each: 32 spill with Triton 3.6."""
    if INTERPRETED:
        return Rows(128 if long else 8, 1024, 8)
    return Rows(64, 64, 8) if long else Rows(4, 128, 1)


def cross_entropy_block(V: int) -> tuple[int, int]:
    """Return the logits of a row per iteration, and warps. With 32 warps at most two programs fit on a processor, so
    the rows in flight (100 kB each, together half of sm_90's L2) stay in L2 until they are read again."""
    block = min(2**16 if INTERPRETED else 8192, triton.next_power_of_2(V))
    return block, max(1, min(32, block // 256))


def head_budget(device: torch.device) -> int:
    """Return the bytes of logits per chunk. Each further chunk costs a pass over dw (12 V C bytes, 0.46 GB for GPT-2
    124M), so a device with much memory takes few."""
    return max(HEAD_BYTES, memory(device) // HEAD_SHARE)


def head_rows(N: int, V: int, itemsize: int, budget: int = HEAD_BYTES) -> int:
    """Return the rows of x per chunk of the head: equal chunks, as few as keep their logits within `budget` bytes."""
    chunks = max(1, -(-N * V * itemsize // budget))
    rows = -(-N // chunks)
    return max(1, min(N, -(-rows // 128) * 128))  # whole tiles of the matmul


def attention_forward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Return the tiles of the forward kernel. Eight warps: with four, 128 x 64 scores spill on sm_80 and sm_120."""
    if dtype == torch.float32 and not INTERPRETED:
        return Tiles(64, 32, 8, 1) if D <= 64 else Tiles(32, 16, 8, 1)
    if D <= 64:
        return {9: Tiles(128, 128, 8, 3), 10: Tiles(128, 128, 8, 2)}.get(capability[0], Tiles(128, 64, 8, 2))
    return Tiles(128, 64, 8, 2) if D <= 128 else Tiles(64, 32, 8, 1)


def attention_dkdv(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Return the tiles of the kernel for dk and dv, whose programs own BLOCK_N keys and walk the queries."""
    if dtype == torch.float32 and not INTERPRETED:
        return Tiles(16, 64, 8, 1) if D <= 64 else Tiles(16, 16, 8, 1)
    if D <= 64:
        return Tiles(64 if capability[0] in (9, 10) else 32, 128, 8, 2)  # without wgmma, 64 x 128 spills
    return Tiles(64, 64, 8, 1) if D <= 128 else Tiles(32, 32, 8, 1)


def attention_dq(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Return the tiles of the kernel for dq, whose programs own BLOCK_M queries and walk the keys."""
    if dtype == torch.float32 and not INTERPRETED:
        return Tiles(32, 32, 8, 1) if D <= 64 else Tiles(16, 16, 8, 1)
    if D <= 64:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 32, 8, 1) if D <= 128 else Tiles(32, 32, 8, 1)


def cached_attention(BLOCK_D: int, dtype: torch.dtype) -> Keys:
    """Return the keys per iteration, 32 kB with their values; two further iterations are prefetched."""
    if INTERPRETED:
        return Keys(128, 8, 3)
    return Keys(2**14 // dtype.itemsize // BLOCK_D, 8, 3)


# Per processor: while one finishes a tile (loads, stores, exponentials), the other one keeps the tensor cores busy.
MATMUL_PROGRAMS = 2


def matmul_tma(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Return whether operands come through TMA. fp32 does not: it is for exactness, in the same way on any device."""
    return capability >= (9, 0) and dtype != torch.float32


def matmul_tiles(dtype: torch.dtype, capability: tuple[int, int], aligned: bool) -> MatmulTiles:
    """Return the tiles of a matrix product. 128 x 256 would need all registers of a processor, which leaves none for a
    second program. On sm_120, and if operands are not aligned to 16 bytes, 128 x 128 spills."""
    if dtype == torch.float32:
        return MatmulTiles(128, 256, 256, 2, 8, 2) if INTERPRETED else MatmulTiles(64, 32, 32, 1, 8, 2)
    if aligned and capability[0] in (9, 10):
        return MatmulTiles(128, 128, 64, 4, 8, 3)
    return MatmulTiles(128, 128 if aligned and capability[0] == 8 else 64, 32, 2, 8, 4)


def attention_one_pass(heads: int, T_q: int, D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether one kernel computes dq, dk and dv (attention_backward.py), or two do. One needs 5 matmuls instead
    of 7, and its scratch costs about as much as a sixth; but a processor takes whole heads, and idles if they do not
    divide evenly. The scratch must stay in L2, and leave a quarter of it to other data. Without wgmma or tcgen05, with
    other heads, and in fp32, all tiles of a sensible size spill (and on sm_100, with D=64 and not causal, 32 bytes).
    Not measured."""
    built_for = capability(device)[0] in (9, 10) and D in (16, 32, 64) and dtype != torch.float32
    if not INTERPRETED and not built_for:
        return False
    programs = processors(device)
    scratch = min(heads, programs) * T_q * triton.next_power_of_2(D) * 4
    rounds = -(-heads // programs)
    return 6 * rounds * programs <= 7 * heads and 4 * scratch <= 3 * l2_cache(device)


def attention_backward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Return the tiles of the kernel that computes dq, dk and dv: 128 keys, since the scratch is read and written once
    per key tile. On sm_100, 64 queries spill with Triton 3.6."""
    return Tiles(32 if capability[0] == 10 else 64, 128, 8, 2)
