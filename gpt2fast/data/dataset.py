"""What a run reads: the shards of a folder by split, or the standard library; their fingerprint and token frequencies.

A folder's shards are split by name: `train` or `val` is part of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2fast.data import stdlib
from gpt2fast.data.shards import open_shard
from gpt2fast.errors import UserError

SUFFIXES = (".bin", ".npy")
ENTROPY_TOKENS = 2**26
PART = 2**24  # tokens that are counted at once


@dataclass(frozen=True)
class Dataset:
    """Memory-mapped uint16 arrays, one a shard. `fingerprint` tells two datasets apart, when a run is resumed."""

    name: str
    train: Sequence[np.ndarray]
    val: Sequence[np.ndarray]
    fingerprint: str


def open_data(name: str, vocab_size: int, tokenizer_file: Path | None = None) -> Dataset:
    """The folder of shards called `name`, or "stdlib". UserError on anything that is not sound."""
    if name == stdlib.NAME:
        train, val = stdlib.encode_splits(tokenizer_file)
        return Dataset(name, [train], [val], fingerprint({"train": train, "val": val}))
    return open_folder(Path(name), vocab_size)


def open_folder(folder: Path, vocab_size: int) -> Dataset:
    """Open every shard of a folder and check it. UserError on anything that is not sound."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"data {folder} {what}: name a folder of shards (python -m gpt2fast.prepare TEXT --out FOLDER makes one)"
        )
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} holds meta.pkl, so its tokens are nanoGPT's characters, not GPT-2's: prepare the text again"
        )
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    train = [path for path in paths if "train" in path.name]
    val = [path for path in paths if "val" in path.name and path not in train]
    if strays := set(paths) - set(train) - set(val):
        raise UserError(f"{min(strays)} belongs to no split: its name must contain train or val")
    if not train:
        raise UserError(f"{folder} holds no training shard: one *train*.bin or *train*.npy at least is needed")
    shards = {path: open_shard(path, vocab_size) for path in paths}
    return Dataset(
        name=str(folder),
        train=[shards[path] for path in train],
        val=[shards[path] for path in val],
        fingerprint=fingerprint({path.name: shard for path, shard in shards.items()}),
    )


def fingerprint(shards: dict[str, np.ndarray]) -> str:
    """16 hex digits of a sha256 over names, lengths and the first and last 2^20 tokens of every shard."""
    digest = hashlib.sha256()
    for name, tokens in sorted(shards.items()):
        digest.update(f"{name}:{len(tokens)}:".encode())
        digest.update(np.ascontiguousarray(tokens[: 2**20]).tobytes())
        digest.update(np.ascontiguousarray(tokens[-(2**20) :]).tobytes())
    return digest.hexdigest()[:16]


def unigram_entropy(counts: np.ndarray) -> float:
    """-sum p ln p, in nats, of token counts: the loss of a model that knows how frequent tokens are, and no more."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def count_tokens(shards: Sequence[np.ndarray], vocab_size: int, limit: int = ENTROPY_TOKENS) -> np.ndarray:
    """How often each token occurs, (vocab_size,) int64, in the first `limit` tokens."""
    counts = np.zeros(vocab_size, np.int64)
    for tokens in shards:
        part = tokens[:limit]
        counts += np.bincount(part, minlength=vocab_size)[:vocab_size]
        limit -= len(part)
    return counts


def count_all(shards: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """How often each token occurs, (vocab_size,) int64. In parts, since counting makes int64 of them."""
    parts = [tokens[i : i + PART] for tokens in shards for i in range(0, len(tokens), PART)]
    return count_tokens(parts, vocab_size, sum(map(len, parts)))
