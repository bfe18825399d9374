"""Block sizes, warps and stages of every kernel: pure functions of shape, dtype and device capability.

What is interpreted gets the half types' tiles of sm_90, so that tests without a GPU walk the same ones; but where a
kernel is elementwise, or walks a row, it gets larger blocks, since the interpreter's cost is per operation. Held by
`benchmarks.aot`, which compiles every launch at GPT-2's shapes for sm_80 to sm_120: no spills, shared memory within
the card's limit. Other shapes run, but some spill (benchmarks/results/aot_other_shapes.jsonl): LayerNorm's backward
beyond 8192 columns, or beyond 4096 where they are no multiple of 16; heads of 80 to 96 on sm_80 and sm_100; dq of
fp32 heads beyond 128.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton.jit looks at it when it decorates, so once
INTERPRETER = (9, 0)  # whose tiles the interpreter walks
WARP = 32
HEAD_BYTES = 2**30  # of logits at a time, at least: enough rows to fill a GPU many times over
HEAD_SHARE = 16  # of the device's memory, for logits: B=64, T=1024 (6.6 GB) is one chunk on an H200, two on 80 GB


class Tiles(NamedTuple):
    """Of attention: rows of queries, rows of keys, warps, stages of the software pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class MatmulTiles(NamedTuple):
    """Of a matrix product: a tile, parts in which its columns are finished, warps, stages of the software pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PIECES: int
    num_warps: int
    num_stages: int


class Keys(NamedTuple):
    """Of attention to a cache: keys at a time, warps, turns in flight."""

    BLOCK_N: int
    num_warps: int
    NUM_STAGES: int


class Chunk(NamedTuple):
    """Of AdamW: elements that a program takes, how many at a time, warps."""

    CHUNK: int
    BLOCK: int
    num_warps: int


class Rows(NamedTuple):
    """Of kernels over the rows of a matrix: rows and columns of a tile, warps."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) for sm_90."""
    if device.type == "cpu":
        return INTERPRETER
    return torch.get_device_module(device).get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; few for the interpreter, so that a persistent program has more than one turn."""
    if device.type == "cpu":
        return 2
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


@functools.cache
def l2_cache(device: torch.device) -> int:
    """Bytes; the interpreter has what an H200 has."""
    if device.type == "cpu":
        return 50 << 20
    return torch.get_device_module(device).get_device_properties(device).L2_cache_size


@functools.cache
def memory(device: torch.device) -> int:
    """Bytes of the device; none for the interpreter, whose chunks are as small as they get."""
    if device.type == "cpu":
        return 0
    return torch.get_device_module(device).get_device_properties(device).total_memory


def elementwise() -> int:
    """Elements of a program: 8 a thread, 16 bytes of a half type, at 4 warps."""
    return 2**16 if INTERPRETED else 1024


def adamw_chunk(norm: bool = False) -> Chunk:
    """Looking up a tensor's addresses takes two loads, one after the other: a small part of the two to eight turns that
    follow. Four elements a thread, so that no fp32 is moved between threads before it is stored; the norm stores
    nothing, and has 4 kB in flight in each program."""
    if INTERPRETED:
        return Chunk(2**15, 2**14, 4)
    return Chunk(4096, 2048, 4) if norm else Chunk(4096, 512, 4)


def elementwise_rows() -> Rows:
    """A tile of an elementwise kernel over a matrix: the bias and GELU, the embedding. 256 columns divide the 4 C of
    every GPT-2, XL's 6400 too."""
    return Rows(256, 256, 4) if INTERPRETED else Rows(8, 256, 4)


def layer_norm_rows(N: int, backward: bool) -> Rows:
    """A whole row in a tile, 16 elements a thread; fewer rows backward, where five arrays of them are alive."""
    block_n = triton.next_power_of_2(N)
    block_m = max(1, (2048 if backward else 4096) // block_n)
    return Rows(block_m, block_n, min(32, max(1, block_m * block_n // (WARP * 16))))


# Little's law: 4.3 TB/s at 0.7 us are 23 kB in flight on each of an H200's processors. Backward has 4 programs there
# with a tile of 12 kB each: 48 kB, but none while they sum, unless the next tile is already under way.
LAYER_NORM_STAGES = 2


def persistent(tiles: int, device: torch.device, per_processor: int = 4) -> int:
    """Programs of a persistent grid: enough to fill the device, and never more than there are tiles."""
    return max(1, min(tiles, per_processor * processors(device)))


def embedding_batch(B: int) -> Rows:
    """Sequences, of which a program adds up some at a time, and elements of (T, C)."""
    return Rows(min(16, triton.next_power_of_2(B)), 2**14 if INTERPRETED else 256, 4)


def embedding_bucket(long: bool) -> Rows:
    """Positions of one token: few of them in one warp, so that many tokens are in work; else 8 or 16 kB in flight.
    16 numbers a thread, since int64 takes two registers for each: with 32 they spill in Triton 3.6."""
    if INTERPRETED:
        return Rows(128 if long else 8, 1024, 8)
    return Rows(64, 64, 8) if long else Rows(4, 128, 1)


def cross_entropy_block(V: int) -> tuple[int, int]:
    """Logits of a row at a time, and warps. 32 warps: at most two programs fit on a processor, so the rows in work
    (2 x 132 x 100 kB on an H200) stay in L2 (50 MB) until they are read again."""
    block = min(2**16 if INTERPRETED else 8192, triton.next_power_of_2(V))
    return block, max(1, min(32, block // 256))


def head_budget(device: torch.device) -> int:
    """Bytes of logits at a time. Each further chunk costs a pass over dw (12 V C bytes: 0.46 GB, 0.1 ms at 4.3 TB/s, of
    GPT-2 124M), so a device that has the memory makes few."""
    return max(HEAD_BYTES, memory(device) // HEAD_SHARE)


def head_rows(N: int, V: int, itemsize: int, budget: int = HEAD_BYTES) -> int:
    """Rows of x in a chunk of the head: equal chunks, as few as keep a chunk's logits within `budget` bytes."""
    chunks = max(1, -(-N * V * itemsize // budget))
    rows = -(-N // chunks)
    return max(1, min(N, -(-rows // 128) * 128))  # whole tiles of the matmul


def attention_forward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Eight warps: with four, 128 x 64 scores spill on sm_80 and sm_120."""
    if dtype == torch.float32 and not INTERPRETED:
        return Tiles(64, 32, 8, 1) if D <= 64 else Tiles(32, 16, 8, 1)
    if D <= 64:
        return {9: Tiles(128, 128, 8, 3), 10: Tiles(128, 128, 8, 2)}.get(capability[0], Tiles(128, 64, 8, 2))
    return Tiles(128, 64, 8, 2) if D <= 128 else Tiles(64, 32, 8, 1)


def attention_dkdv(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Programs own BLOCK_N keys and walk the queries."""
    if dtype == torch.float32 and not INTERPRETED:
        return Tiles(16, 64, 8, 1) if D <= 64 else Tiles(16, 16, 8, 1)
    if D <= 64:
        return Tiles(64 if capability[0] in (9, 10) else 32, 128, 8, 2)  # without wgmma, 64 x 128 spill
    return Tiles(64, 64, 8, 1) if D <= 128 else Tiles(32, 32, 8, 1)


def attention_dq(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Programs own BLOCK_M queries and walk the keys."""
    if dtype == torch.float32 and not INTERPRETED:
        return Tiles(32, 32, 8, 1) if D <= 64 else Tiles(16, 16, 8, 1)
    if D <= 64:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 32, 8, 1) if D <= 128 else Tiles(32, 32, 8, 1)


def cached_attention(BLOCK_D: int, dtype: torch.dtype) -> Keys:
    """32 kB of keys and values a turn, of which two are under way while one is worked on."""
    if INTERPRETED:
        return Keys(128, 8, 3)
    return Keys(2**14 // dtype.itemsize // BLOCK_D, 8, 3)


# While one program finishes a tile (loads, stores, exponentials), the other one keeps the tensor cores busy.
MATMUL_PROGRAMS = 2


def matmul_tma(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether operands come through TMA. fp32 is there to be exact, on any device in the same way."""
    return capability >= (9, 0) and dtype != torch.float32


def matmul_tiles(dtype: torch.dtype, capability: tuple[int, int], aligned: bool) -> MatmulTiles:
    """128 x 256 would need all registers of a processor, and no second program would run beside it. On sm_120, and
    where operands are not aligned to 16 bytes, 128 x 128 spill."""
    if dtype == torch.float32:
        return MatmulTiles(128, 256, 256, 2, 8, 2) if INTERPRETED else MatmulTiles(64, 32, 32, 1, 8, 2)
    if aligned and capability[0] in (9, 10):
        return MatmulTiles(128, 128, 64, 4, 8, 3)
    return MatmulTiles(128, 128 if aligned and capability[0] == 8 else 64, 32, 2, 8, 4)


def attention_one_pass(heads: int, T_q: int, D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one kernel makes dq, dk and dv (attention_backward.py), or two do. One has 5 matmuls instead of 7, and
    its scratch costs about what a sixth would; but a processor takes whole heads, and idles when they do not divide
    evenly. The scratch must stay in L2, and leave a quarter to what streams past. Without wgmma or tcgen05, with other
    heads and in fp32 no tiles of a sensible size are free of spills (32 bytes on sm_100 if not causal). Not measured.
    """
    built_for = capability(device)[0] in (9, 10) and D in (16, 32, 64) and dtype != torch.float32
    if not INTERPRETED and not built_for:
        return False
    programs = processors(device)
    scratch = min(heads, programs) * T_q * triton.next_power_of_2(D) * 4
    rounds = -(-heads // programs)
    return 6 * rounds * programs <= 7 * heads and 4 * scratch <= 3 * l2_cache(device)


def attention_backward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Of the one kernel that makes dq, dk and dv: 128 keys, since the scratch is read and written once a key tile. On
    sm_100, 64 queries spill with Triton 3.6."""
    return Tiles(32 if capability[0] == 10 else 64, 128, 8, 2)
