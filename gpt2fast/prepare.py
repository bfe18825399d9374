"""Your own text -> token shards: `python -m gpt2fast.prepare PATH...`.

Writes data/mine/train_000000.bin, ..., val_000000.bin in llm.c's format, and manifest.json: counts, sha256 of each
shard, characters per token, and the unigram entropy of the corpus, which is the loss that knowing only token
frequencies reaches. The folder gets its name when it is complete; until then it is called data/mine.partial.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2fast import run, sources, tokenizer
from gpt2fast.data import unigram_entropy, write_shard
from gpt2fast.errors import RunError, UserError, run_main
from gpt2fast.files import publish
from gpt2fast.model import VOCAB_SIZE
from gpt2fast.sources import Piece

BATCH_CHARACTERS = 2**22  # tokenised in parallel at a time


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text files, .jsonl and .parquet, or folders of them, into token shards."""

    paths: tuple[Path, ...]
    """Files and folders."""
    out: Path = Path("data/mine")
    """The folder to make."""
    field: str = "text"
    """What holds the text in .jsonl and .parquet."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".jsonl", ".parquet")
    """Files to take from folders."""
    val_fraction: float = 0.05
    """Share of the documents, or of each text where there are few, that is kept for validation."""
    shard_tokens: int = 10**8
    """Tokens in a shard."""
    threads: int = os.cpu_count() or 1
    """Of the tokenizer."""
    tokenizer_file: Path | None = None
    """GPT-2's vocab.bpe, where it can neither be found nor downloaded."""


@dataclass
class Split:
    """Collects one split's tokens and writes a shard whenever one is full."""

    name: str
    folder: Path
    shard_tokens: int
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    shards: list[dict] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(VOCAB_SIZE, np.int64))
    _pending: list[np.ndarray] = field(default_factory=list)
    _pending_tokens: int = 0

    def add(self, piece: Piece, ids: list[int]) -> None:
        tokens = np.array([tokenizer.EOT, *ids] if piece.first else ids, np.uint16)
        self.documents += piece.first
        self.characters += len(piece.text)
        self.tokens += len(tokens)
        self.counts += np.bincount(tokens, minlength=VOCAB_SIZE)
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        while self._pending_tokens >= self.shard_tokens:
            self._write(self.shard_tokens)

    def finish(self) -> None:
        if self._pending_tokens:
            self._write(self._pending_tokens)

    def _write(self, n: int) -> None:
        tokens = np.concatenate(self._pending)
        self._pending, self._pending_tokens = [tokens[n:]], len(tokens) - n
        path = self.folder / f"{self.name}_{len(self.shards):06d}.bin"
        write_shard(path, tokens[:n])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append({"name": path.name, "tokens": n, "sha256": digest})

    def manifest(self) -> dict:
        return {name: getattr(self, name) for name in ("documents", "characters", "tokens", "shards")}


def prepare(c: PrepareConfig) -> dict:
    """Tokenise and write; the manifest. UserError on bad input: then nothing is left behind."""
    _check(c)
    files = sources.find(c.paths, c.suffixes)
    encoding = tokenizer.load(c.tokenizer_file)
    partial = c.out.with_name(c.out.name + ".partial")
    try:
        with run.locked(partial):
            for old in partial.iterdir():
                if old.name != "lock":
                    old.unlink()
            manifest = _write_shards(c, files, encoding, partial)
            (partial / "lock").unlink(missing_ok=True)
            publish(partial, c.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"cannot write {error.filename or partial} ({error.strerror}): free some space, or change --out"
        ) from None
    except (UserError, KeyboardInterrupt):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _check(c: PrepareConfig) -> None:
    if not 0 <= c.val_fraction <= 0.5:
        raise UserError(f"--val-fraction is {c.val_fraction}: it must lie between 0 and 0.5")
    for name in ("shard_tokens", "threads"):
        if getattr(c, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(c, name)}: it must be at least 1")
    if c.shard_tokens >= 2**31:
        raise UserError(f"--shard-tokens is {c.shard_tokens}: the format counts below {2**31}")
    if c.out.exists():
        raise UserError(f"{c.out} already exists: choose another folder with --out")


def _write_shards(c: PrepareConfig, files: Sequence[Path], encoding, folder: Path) -> dict:
    every = round(1 / c.val_fraction) if c.val_fraction else 0
    splits = Split("train", folder, c.shard_tokens), Split("val", folder, c.shard_tokens)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", mininterval=0.5) as bar:
        for pieces in _batches(sources.read(files, c.field, every)):
            encoded = encoding.encode_ordinary_batch([piece.text for piece in pieces], num_threads=c.threads)
            for piece, ids in zip(pieces, encoded):
                splits[piece.val].add(piece, ids)
            bar.update(sum(piece.size for piece in pieces))
    train, val = splits
    if not train.characters:
        raise UserError(f"the corpus is empty: no text for training in {len(files)} files")
    for split in splits:
        split.finish()
    manifest = {
        "format": "llm.c 20240520 version 1",
        "tokenizer": "gpt2",
        "files": len(files),
        "characters_per_token": (train.characters + val.characters) / (train.tokens + val.tokens),
        "distinct_tokens": int(((train.counts + val.counts) > 0).sum()),
        "unigram_entropy": unigram_entropy(train.counts + val.counts),
        "train": train.manifest(),
        "val": val.manifest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def main(argv: Sequence[str]) -> None:
    import tyro

    c = tyro.cli(
        PrepareConfig, args=argv, prog="python -m gpt2fast.prepare", config=(tyro.conf.PositionalRequiredArgs,)
    )
    start = time.perf_counter()
    m = prepare(c)
    train, val = m["train"], m["val"]
    tokens = train["tokens"] + val["tokens"]
    print(f"files                {m['files']:,}, {train['documents'] + val['documents']:,} documents")
    print(f"tokens               {train['tokens']:,} for training, {val['tokens']:,} for validation")
    print(f"characters per token {m['characters_per_token']:.2f}")
    print(f"distinct tokens      {m['distinct_tokens']:,} of {VOCAB_SIZE:,}")
    print(f"unigram entropy      {m['unigram_entropy']:.3f} nats: the loss that knowing only token frequencies reaches")
    print(f"speed                {tokens / (time.perf_counter() - start):,.0f} tokens/s")
    if not val["tokens"]:
        print("note                 too little text for a validation split")
    print(f"next                 python -m gpt2fast.train --data {c.out} --run {c.out.name}")


if __name__ == "__main__":
    run_main(main)
