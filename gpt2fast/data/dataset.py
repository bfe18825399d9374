"""The data of a run: a folder's shards or the standard library, by split; their fingerprint and token frequencies.

The name of a shard says to which split it belongs: it contains `train` or `val`.
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
PART = 2**24  # tokens counted at a time


@dataclass(frozen=True)
class Dataset:
    """The splits as (n,) uint16 arrays, one per shard, memory-mapped if they are files.

    `fingerprint` tells two datasets apart when a run is resumed.
    """

    name: str
    train: Sequence[np.ndarray]
    val: Sequence[np.ndarray]
    fingerprint: str


def open_data(name: str, vocab_size: int, tokenizer_file: Path | None = None) -> Dataset:
    """Open the folder of shards called `name`, or "stdlib". UserError if it is missing, damaged or incomplete."""
    if name == stdlib.NAME:
        train, val = stdlib.encode_splits(tokenizer_file)
        return Dataset(name, [train], [val], fingerprint({"train": train, "val": val}))
    return open_folder(Path(name), vocab_size)


def open_folder(folder: Path, vocab_size: int) -> Dataset:
    """Open and check every shard of a folder. UserError if it is missing, damaged or incomplete."""
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
        raise UserError(f"{folder} holds no training shard: put a *train*.bin or *train*.npy there, or name another")
    shards = {path: open_shard(path, vocab_size) for path in paths}
    return Dataset(
        name=str(folder),
        train=[shards[path] for path in train],
        val=[shards[path] for path in val],
        fingerprint=fingerprint({path.name: shard for path, shard in shards.items()}),
    )


def fingerprint(shards: dict[str, np.ndarray]) -> str:
    """Return 16 hex digits of a sha256 of names, lengths and the first and last 2^20 tokens of every shard."""
    digest = hashlib.sha256()
    for name, tokens in sorted(shards.items()):
        digest.update(f"{name}:{len(tokens)}:".encode())
        digest.update(np.ascontiguousarray(tokens[: 2**20]).tobytes())
        digest.update(np.ascontiguousarray(tokens[-(2**20) :]).tobytes())
    return digest.hexdigest()[:16]


def unigram_entropy(counts: np.ndarray) -> float:
    """Return -sum p ln p in nats for token counts: the loss of a model that knows only how frequent each token is."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def count_tokens(shards: Sequence[np.ndarray], vocab_size: int, limit: int = ENTROPY_TOKENS) -> np.ndarray:
    """Count each token in the first `limit` tokens of all shards: (vocab_size,) int64."""
    counts = np.zeros(vocab_size, np.int64)
    for tokens in shards:
        part = tokens[:limit]
        counts += np.bincount(part, minlength=vocab_size)[:vocab_size]
        limit -= len(part)
    return counts


def count_all(shards: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Count each token in all shards: (vocab_size,) int64. In parts, since np.bincount converts its input to int64."""
    parts = [tokens[i : i + PART] for tokens in shards for i in range(0, len(tokens), PART)]
    return count_tokens(parts, vocab_size, sum(map(len, parts)))
