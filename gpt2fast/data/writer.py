"""Write tokens to shard files, with a record from which a killed run resumes.

    data/mine.partial/
        train_000000.bin, val_000000.bin, ...     full shards
        progress.npz                              the state after the newest of them

The record is replaced atomically whenever a shard has become full and has reached the disk. What was written after it
is written again with the same bytes, since the content of a shard depends on the text alone.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpt2fast.data.dataset import unigram_entropy
from gpt2fast.data.shards import HEADER_BYTES, write_shard
from gpt2fast.data.texts import Piece
from gpt2fast.errors import UserError
from gpt2fast.files import atomic, checked, containers
from gpt2fast.model import VOCAB_SIZE

RECORD = "progress.npz"
_SHARD = re.compile(r"(train|val)_[0-9]{6}\.bin")
_OURS = re.compile(r"(train|val)_\d{6}\.bin|progress\.npz|manifest\.json|download\.txt|lock|\..*\.tmp")


class Stream:
    """The tokens of one split, cut into shards. With `val_first` the first shard is the validation split."""

    def __init__(self, name: str, folder: Path, shard_tokens: int, val_first: bool = False):
        self.name, self.folder, self.val_first = name, folder, val_first
        self.shards: list[dict] = []
        self._buffer = np.empty(shard_tokens, np.uint16)
        self._n = 0

    @property
    def pending(self) -> np.ndarray:
        """The tokens after the last full shard, (n,) uint16."""
        return self._buffer[: self._n]

    def add(self, tokens: np.ndarray) -> None:
        """Add (n,) uint16 tokens; full shards are written. OSError names the file."""
        while len(tokens):
            part = tokens[: len(self._buffer) - self._n]
            self._buffer[self._n : self._n + len(part)] = part
            self._n += len(part)
            tokens = tokens[len(part) :]
            if self._n == len(self._buffer):
                self.write()

    def write(self) -> None:
        """Write the pending tokens as a shard, if there are any."""
        if not self._n:
            return
        name = "val" if self.val_first and not self.shards else self.name
        path = self.folder / f"{name}_{len(self.shards):06d}.bin"
        with atomic.named(path):
            write_shard(path, self.pending)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append({"name": path.name, "tokens": self._n, "sha256": digest})
        self._n = 0


@dataclass
class Done:
    """How far the text has been read, and what was in it. `state` is the source's own record of its position."""

    pieces: int = 0
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    read: int = 0
    state: dict | None = None


class Writer:
    """Write the shards of both splits to `folder`. A record is resumed only if its `identity`, plain JSON, is equal."""

    def __init__(self, folder: Path, shard_tokens: int, max_tokens: int | None, val_first: bool, identity: dict):
        self.folder, self.max_tokens, self.identity = folder, max_tokens, identity
        self.train = Stream("train", folder, shard_tokens, val_first)
        self.val = Stream("val", folder, shard_tokens)
        self.counts = np.zeros(VOCAB_SIZE, np.int64)
        self.done = Done()
        self.recorded = 0

    @property
    def shards(self) -> list[dict]:
        """The name, tokens and sha256 of each shard of both splits."""
        return self.train.shards + self.val.shards

    @property
    def full(self) -> bool:
        """Whether `max_tokens` have been taken."""
        return self.max_tokens is not None and self.done.tokens >= self.max_tokens

    def add(self, pieces: Sequence[Piece], arrays: Sequence[np.ndarray], state: dict | None) -> None:
        """Add pieces and their tokens; `state` is the source's state after the last of them."""
        kept = []
        for piece, tokens in zip(pieces, arrays):
            share = 1.0
            if self.max_tokens is not None and len(tokens) > (room := self.max_tokens - self.done.tokens):
                share, tokens = room / len(tokens), tokens[:room]
            (self.val if piece.val else self.train).add(tokens)
            kept.append(tokens)
            self.done.pieces += 1
            self.done.documents += piece.first
            self.done.characters += round(share * len(piece.text))
            self.done.tokens += len(tokens)
            self.done.read = piece.read
            if self.full:
                break
        self.counts += np.bincount(np.concatenate(kept), minlength=VOCAB_SIZE)
        self.done.state = state
        if len(self.shards) > self.recorded:
            self._record()

    def _record(self) -> None:
        for shard in self.shards:
            atomic.sync(self.folder / shard["name"])
        record = {
            "identity": self.identity,
            "done": asdict(self.done),
            "train": self.train.shards,
            "val": self.val.shards,
        }
        data = io.BytesIO()
        np.savez(
            data,
            record=np.array(json.dumps(record)),
            train=self.train.pending,
            val=self.val.pending,
            counts=self.counts,
        )
        atomic.write_atomic(self.folder / RECORD, data.getvalue())
        self.recorded = len(self.shards)

    def resume(self) -> None:
        """Continue from the record, if there is one; else delete what a killed run left.

        UserError if the record belongs to another run, or the folder holds other files; nothing is changed then.
        """
        remedy = f"delete {self.folder} to begin again, or choose another --out"
        names = {path.name for path in self.folder.iterdir()}
        if strays := [name for name in names if not _OURS.fullmatch(name)]:
            raise UserError(f"{self.folder} holds {min(strays)}, which prepare did not write: choose another --out")
        kept = {"lock"}
        if RECORD in names:
            self._load(remedy)
            kept |= {RECORD, *(shard["name"] for shard in self.shards)}
        for name in names - kept:
            (self.folder / name).unlink()

    def _load(self, remedy: str) -> None:
        path = self.folder / RECORD
        try:
            saved = containers.read_npz(path)
            record = checked.parse_json(str(saved["record"]).encode())
            pending = {name: saved[name] for name in ("train", "val")}
            counts = saved["counts"]
            self._check(record, pending, counts)
            done, old, shards = checked.fill(Done, record["done"]), record["identity"], record["train"] + record["val"]
            sizes = {shard["name"]: (self.folder / shard["name"]).stat().st_size for shard in shards}
        except containers.NPZ_ERRORS as error:
            raise UserError(f"{path} is damaged or a shard is missing ({error}): {remedy}") from None
        for shard in shards:
            name, size, expected = shard["name"], sizes[shard["name"]], HEADER_BYTES + 2 * shard["tokens"]
            if size != expected:
                raise UserError(f"{self.folder / name} has {size} bytes, not {expected}: {remedy}")
        if differing := sorted(name for name in old | self.identity if old.get(name) != self.identity.get(name)):
            raise UserError(f"{self.folder} belongs to a run with other settings ({', '.join(differing)}): {remedy}")
        self.done, self.counts, self.recorded = done, counts, len(shards)
        for stream in (self.train, self.val):
            stream.shards = record[stream.name]
            stream.add(pending[stream.name])

    def _check(self, record: dict, pending: dict[str, np.ndarray], counts: np.ndarray) -> None:
        """Raise ValueError or TypeError if `_record` cannot have written this."""
        checked.check("identity", record["identity"], dict)
        for split in ("train", "val"):
            whole = self.train.pending.base
            assert whole is not None, "pending is a view of the buffer"
            room = len(whole)
            if pending[split].ndim != 1 or pending[split].dtype != np.uint16 or len(pending[split]) >= room:
                raise ValueError(f"{split} is {pending[split].dtype} of shape {pending[split].shape}")
            for shard in record[split]:
                checked.check("shard", shard, dict[str, int | str])
                checked.check("tokens", shard["tokens"], int)
                if not _SHARD.fullmatch(shard["name"]):
                    raise ValueError(f"{shard['name']!r} is not the name of a shard")
        if counts.shape != (VOCAB_SIZE,) or counts.dtype != np.int64 or counts.min() < 0:
            raise ValueError(f"counts are {counts.dtype} of shape {counts.shape}")

    def finish(self) -> dict:
        """Write the pending tokens and return counts and shards, for the manifest."""
        self.train.write()
        self.val.write()
        splits = {
            split: [shard for shard in self.shards if shard["name"].startswith(split)] for split in ("train", "val")
        }
        return {
            "documents": self.done.documents,
            "characters": self.done.characters,
            "tokens": self.done.tokens,
            "distinct_tokens": int(np.count_nonzero(self.counts)),
            "characters_per_token": self.done.characters / max(1, self.done.tokens),
            "unigram_entropy": unigram_entropy(self.counts),
        } | {
            split: {"tokens": sum(shard["tokens"] for shard in shards), "shards": shards}
            for split, shards in splits.items()
        }
