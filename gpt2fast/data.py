"""Token shards and the batches cut from them.

A shard is a file of GPT-2 tokens. Three formats are read, told apart by their first bytes; the first is written:

    llm.c, modded-nanogpt  .bin   256 int32: 20240520, 1, number of tokens, zeros; then uint16 tokens
    build-nanogpt          .npy   one-dimensional uint16 NumPy array
    nanoGPT                .bin   uint16 tokens and nothing else

They cannot be confused: the first uint16 of 20240520 is 55432, which is no GPT-2 token. All integers are
little-endian. Files are memory-mapped; a batch is all that is ever read.

A folder's shards are split by name: `train` or `val` is part of it. Batch number i is a pure function of (shards, B,
T, shuffle, seed, i), so the position of a run is one integer and resuming needs no other state.
"""

import hashlib
import itertools
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2fast.containers import check_npy
from gpt2fast.errors import RunError, UserError
from gpt2fast.records import open_file

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
SUFFIXES = (".bin", ".npy")
SCAN_TOKENS = 2**24  # a shard's range of tokens is checked this far at start-up; what lies beyond, batch by batch
ENTROPY_TOKENS = 2**26


@dataclass(frozen=True)
class Dataset:
    """Memory-mapped uint16 arrays, one a shard. `fingerprint` tells two datasets apart, when a run is resumed."""

    name: str
    train: Sequence[np.ndarray]
    val: Sequence[np.ndarray]
    fingerprint: str


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


def open_shard(path: Path, vocab_size: int) -> np.ndarray:
    """A shard's tokens (n,) uint16, memory-mapped. Size, header and the range of tokens are checked."""
    try:
        size = path.stat().st_size
        with open_file(path) as file:
            head = file.read(HEADER_BYTES)
        if size == 0:
            raise UserError(f"shard {path} is empty: delete it, or write it again")
        if head[:6] == b"\x93NUMPY":
            tokens = _open_npy(path)
        elif len(head) >= 4 and int(np.frombuffer(head[:4], "<i4")[0]) == MAGIC:
            tokens = _open_llmc(path, head, size)
        else:
            tokens = _open_raw(path, head, size, vocab_size)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror or error}") from None
    check_tokens(tokens[:SCAN_TOKENS], vocab_size, str(path))
    return tokens


def _open_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            check_npy(file, path.stat().st_size)
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"shard {path} is a damaged NumPy file ({error}): write it again") from None
    if tokens.ndim != 1 or tokens.dtype != np.dtype("<u2"):
        raise UserError(f"shard {path} holds {tokens.dtype} of shape {tokens.shape}: one-dimensional uint16 is needed")
    return tokens


def _open_llmc(path: Path, head: bytes, size: int) -> np.ndarray:
    if len(head) < HEADER_BYTES:
        raise UserError(f"shard {path} is truncated: {size} bytes are less than its header of {HEADER_BYTES}")
    version, n = (int(value) for value in np.frombuffer(head, "<i4")[1:3])
    if version != VERSION:
        raise UserError(f"shard {path} has version {version}: only version {VERSION} (uint16 tokens) is read")
    if n < 0 or size != HEADER_BYTES + 2 * n:
        raise UserError(
            f"shard {path} is truncated or padded: its header counts {n} tokens, which take {HEADER_BYTES + 2 * n} "
            f"bytes, but it has {size}: copy or write it again"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(n,)) if n else np.empty(0, "<u2")


def _open_raw(path: Path, head: bytes, size: int, vocab_size: int) -> np.ndarray:
    if size % 2:
        raise UserError(f"shard {path} has {size} bytes, an odd number: uint16 tokens take two bytes each")
    first = int(np.frombuffer(head[:2], "<u2")[0])
    if first >= vocab_size:
        magic = int.from_bytes(head[:4], "little")
        raise UserError(
            f"shard {path} has the wrong magic {magic}: llm.c shards begin with {MAGIC}, NumPy's with \\x93NUMPY, "
            f"and as plain uint16 its first token {first} is not below {vocab_size}"
        )
    return np.memmap(path, "<u2", "r")


def read_tokens(shard: np.ndarray, start: int, stop: int) -> np.ndarray:
    """shard[start:stop]. RunError if its file is shorter than when it was mapped: to read such a map past its file's
    end is SIGBUS, which ends Python without a word. A file that was deleted stays whole as long as it is mapped."""
    if isinstance(shard.base, mmap.mmap) and shard.base.size() < shard.offset + shard.nbytes:
        raise RunError(
            f"shard {shard.filename} has been cut to {shard.base.size()} bytes, of {shard.offset + shard.nbytes}, "
            "while it was read: restore it, then continue with --resume"
        )
    return shard[start:stop]


def check_tokens(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """UserError if a token is not below `vocab_size`: an embedding would read past its table."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        i = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{where}: token {int(tokens.flat[i])} at position {i} is not below the vocabulary of {vocab_size}"
        )


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write (n,) uint16 tokens in llm.c's format. The caller makes the file appear whole (prepare renames a folder)."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, "<u2").tobytes())


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


@dataclass(frozen=True)
class Loader:
    """Batches x, y of (B, T) from B*T + 1 tokens: y is the token to the right of x.

    Every shard is cut into windows of T + 1 tokens that overlap by one; what is left at a shard's end is not used.
    Sequential (`shuffle=False`): windows in order, so a batch is one run of B*T + 1 tokens wherever a shard holds it.
    Shuffled: each epoch in a permutation drawn from (seed, epoch).
    """

    shards: Sequence[np.ndarray]
    B: int
    T: int
    vocab_size: int
    shuffle: bool = False
    seed: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.batches_per_epoch == 0:
            n = max((len(tokens) for tokens in self.shards), default=0)
            raise UserError(
                f"a batch needs B*T+1 = {self.B * self.T + 1} tokens (B={self.B}, T={self.T}), and the longest shard "
                f"holds {n}: lower --batch-size or --seq-len, or give more text"
            )

    @cached_property
    def _ends(self) -> np.ndarray:
        """Windows up to the end of each shard."""
        return np.cumsum([max(0, len(tokens) - 1) // self.T for tokens in self.shards], dtype=np.int64)

    @cached_property
    def batches_per_epoch(self) -> int:
        return int(self._ends[-1]) // self.B if len(self._ends) else 0

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        """Batch number i, counted through all epochs: x and y, (B, T) int64, on the CPU."""
        epoch, k = divmod(i, self.batches_per_epoch)
        windows = np.arange(k * self.B, (k + 1) * self.B)
        if self.shuffle:
            windows = self._order(epoch)[windows]
        rows = np.empty((self.B, self.T + 1), np.int64)
        for row, window in zip(rows, windows):
            shard = int(np.searchsorted(self._ends, window, side="right"))
            start = int(window - (self._ends[shard - 1] if shard else 0)) * self.T
            row[:] = read_tokens(self.shards[shard], start, start + self.T + 1)
        check_tokens(rows, self.vocab_size, f"batch {i}")
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()
            # RandomState, not Generator: NumPy promises that its streams never change between versions
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
            self._orders[epoch] = random.permutation(int(self._ends[-1]))
        return self._orders[epoch]

    def batches(self, start: int, device: torch.device, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Each `every`-th batch from number `start` on, on `device`, made while the device works on the one before.

        On CUDA they are pinned and copied asynchronously: the host never waits, and torch keeps a pinned block until
        its copy is done.
        """
        ahead = self._send(self.batch(start), device)
        for i in itertools.count(start + every, every):
            current, ahead = ahead, self._send(self.batch(i), device)
            yield current

    @staticmethod
    def _send(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        if device.type == "cuda":
            x, y = (tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
        else:
            x, y = (tensor.to(device) for tensor in batch)
        return x, y
