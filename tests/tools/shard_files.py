"""Shards as each project writes them."""

from pathlib import Path

import numpy as np

from gpt2fast.data import shards

V = 50257
TOKENS = np.random.default_rng(0).integers(0, V, 1000).astype(np.uint16)


def write_tokens(path: Path, format: str, tokens: np.ndarray = TOKENS) -> Path:
    """Write (n,) uint16 tokens in the format "llm.c", "npy" or "raw"."""
    if format == "llm.c":
        shards.write_shard(path, tokens)
    elif format == "npy":
        np.save(path, tokens)
    else:
        path.write_bytes(tokens.tobytes())
    return path


def llmc_header(n: int) -> bytes:
    """Return llm.c's header: 256 int32 that begin with magic, version and number of tokens."""
    return np.concatenate([[20240520, 1, n], np.zeros(253)]).astype(np.int32).tobytes()
