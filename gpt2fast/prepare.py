"""Turn text into token shards: `python -m gpt2fast.prepare shakespeare`, `fineweb-edu`, `openwebtext`, or `PATH...`.

Writes train_000000.bin, ..., val_000000.bin in llm.c's format, and manifest.json: the source, counts, the sha256 of
each shard, characters per token, and the corpus' unigram entropy, the loss of a model that knows only token
frequencies. The folder gets its name when it is complete; until then it is OUT.partial, and the same command resumes
there after the last full shard, however the run before it ended.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tiktoken
from tqdm import tqdm

from gpt2fast.command import named_from, parse, run_main
from gpt2fast.data import corpora, tokenizer
from gpt2fast.data.corpora import CORPORA, Source
from gpt2fast.data.encode import encode_batches
from gpt2fast.data.writer import RECORD, Writer
from gpt2fast.errors import RunError, UserError, check_at_least
from gpt2fast.files.atomic import check_new, publish, write_atomic
from gpt2fast.files.locked import locked
from gpt2fast.model import VOCAB_SIZE

_SMALLER = "lower --shard-tokens"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn a known corpus, or text files, .jsonl and .parquet (also .gz), or folders of them, into token shards."""

    paths: tuple[str, ...]
    """A corpus (shakespeare, fineweb-edu, fineweb, openwebtext), or files and folders."""
    out: Path | None = None
    """Folder to make. None: data/<corpus>, or data/mine for your own files."""
    from_: "Annotated[Path | None, named_from()]" = None
    """File or folder to read instead of downloading the corpus. None: download it."""
    field: str = "text"
    """Field or column of .jsonl and .parquet that holds the text."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".jsonl", ".parquet")
    """Suffixes of the files to take from folders."""
    val_fraction: float | None = None
    """Share of the documents, or of each of a few texts, for validation; 0: none. None: 0.05, or a corpus' own rule."""
    shard_tokens: int = 10**8
    """Tokens in a shard."""
    max_tokens: int | None = None
    """Stop after this many tokens, for example 300_000_000 for the first three shards. None: take all."""
    threads: int = os.cpu_count() or 1
    """Threads of the tokenizer; the default is one per core."""
    tokenizer_file: Path | None = None
    """GPT-2's vocab.bpe. None: find or download it."""

    @property
    def corpus(self) -> str | None:
        """The name of the corpus; None for the user's own files."""
        return str(self.paths[0]) if len(self.paths) == 1 and str(self.paths[0]) in CORPORA else None

    @property
    def folder(self) -> Path:
        """The folder to make."""
        return self.out or Path("data") / (self.corpus or "mine")


def prepare(c: PrepareConfig) -> tuple[dict, int]:
    """Tokenise and write. Return the manifest, and the number of tokens that this call added.

    UserError on bad input, which leaves no files; RunError and Ctrl-C leave a folder that the same call resumes.
    """
    _check(c)
    source = _source(c)
    encoding = tokenizer.load(c.tokenizer_file)
    partial = c.folder.with_name(c.folder.name + ".partial")
    with locked(partial):  # also while it is renamed
        check_new(c.folder)  # the process that held the lock may have made it
        identity = {"source": source.name, **source.identity, "split": source.corpus.split, "field": c.field}
        identity |= {"shard-tokens": c.shard_tokens, "max-tokens": c.max_tokens}
        writer = Writer(partial, c.shard_tokens, c.max_tokens, source.corpus.val_first, identity)
        writer.resume()
        before = writer.done.tokens
        try:
            manifest = _write(c, source, encoding, writer)
            publish(partial, c.folder)
        except BaseException as error:
            raise _outcome(error, writer) from None
        for name in (RECORD, "lock"):
            (c.folder / name).unlink(missing_ok=True)
    return manifest, manifest["tokens"] - before


def _check(c: PrepareConfig) -> None:
    names = [str(path) for path in c.paths if str(path) in CORPORA]
    if not c.paths:
        raise UserError(f"nothing to prepare: name {', '.join(CORPORA)}, or files and folders")
    if names and len(c.paths) > 1:
        raise UserError(f"{names[0]} is a corpus, prepared by itself: write ./{names[0]} for the path")
    if c.from_ and not c.corpus:
        raise UserError(f"--from replaces the download of {', '.join(CORPORA)}: name one of them, or leave out --from")
    if c.corpus and c.val_fraction is not None:
        raise UserError(f"the split of {c.corpus} is fixed ({CORPORA[c.corpus].split}): leave out --val-fraction")
    if not 0 <= (c.val_fraction or 0) <= 0.5:
        raise UserError(f"--val-fraction is {c.val_fraction}: it must be between 0 and 0.5")
    check_at_least(c, shard_tokens=1, threads=1, max_tokens=1)
    if c.corpus and CORPORA[c.corpus].val_first and c.max_tokens is not None and c.max_tokens <= c.shard_tokens:
        raise UserError(
            f"--max-tokens {c.max_tokens} leaves no text for training, as the first shard validates: {_SMALLER}"
        )
    if c.shard_tokens >= 2**31:
        raise UserError(f"--shard-tokens is {c.shard_tokens}: it must be below {2**31}, the format's limit")
    check_new(c.folder)


def _source(c: PrepareConfig) -> Source:
    if not c.corpus:
        paths = [Path(path) for path in c.paths]
        for path in paths:
            if not path.exists():
                raise UserError(
                    f"{path} does not exist, and is not a corpus ({', '.join(CORPORA)}): name a file or one of these"
                )
        return corpora.open_files(paths, c.suffixes, c.field, 0.05 if c.val_fraction is None else c.val_fraction)
    if Path(c.corpus).exists():
        print(f"note                 {c.corpus} is the corpus: for the path of that name write ./{c.corpus}")
    source = corpora.open_corpus(c.corpus, c.from_, c.suffixes, c.field)
    if source.corpus.sha256 != source.about.get("sha256"):
        print(f"note                 {c.from_} is not the known {c.corpus}: its sha256 is {source.about['sha256']}")
    return source


def _outcome(error: BaseException, writer: Writer) -> BaseException:
    """Return what to raise; OUT.partial is deleted if no run could resume from it."""
    if isinstance(error, OSError):
        path = error.filename or writer.folder
        error = RunError(f"cannot write {path} ({error.strerror}): free some space, or change --out")
    bad_input = isinstance(error, UserError) and not isinstance(error, RunError)
    if bad_input or not writer.recorded:
        shutil.rmtree(writer.folder, ignore_errors=True)
        return error
    kept = f"{writer.folder} keeps {writer.recorded} shards: run the same command again to continue"
    if isinstance(error, RunError):
        return RunError(f"{error} ({kept})")
    print(kept, file=sys.stderr)
    return error


def _write(c: PrepareConfig, source: Source, encoding: tiktoken.Encoding, writer: Writer) -> dict:
    done, corpus = writer.done, source.corpus
    if writer.recorded:
        print(f"resuming             after shard {writer.recorded}, {done.tokens:,} tokens")
    pieces, state = source.read(writer.folder, done.pieces, done.state)
    by_bytes = source.bytes and not c.max_tokens
    bar = tqdm(
        total=source.bytes if by_bytes else min(filter(None, (corpus.tokens, c.max_tokens)), default=None),
        initial=done.read if by_bytes else done.tokens,
        unit="B" if by_bytes else "tok",
        unit_scale=True,
        desc="tokenising",
        mininterval=0.5,
    )
    start, before = time.perf_counter(), done.tokens
    if writer.full:
        pieces = iter(())
    with bar, contextlib.closing(encode_batches(pieces, state, encoding, corpus.separated, c.threads)) as batches:
        for batch, arrays, after in batches:
            writer.add(batch, arrays, after)
            if by_bytes:
                speed = (done.tokens - before) / (time.perf_counter() - start)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update((done.read if by_bytes else done.tokens) - bar.n)
            if writer.full:
                break
    counts = writer.finish()
    if not counts["train"]["tokens"]:
        if counts["val"]["tokens"] and corpus.val_first:
            raise UserError(f"{done.tokens:,} tokens are not more than the first shard, which validates: {_SMALLER}")
        raise UserError("the corpus is empty, with no text for training: name other files")
    manifest = {
        "format": "llm.c 20240520 version 1",
        "tokenizer": {"name": "gpt2", "vocab_sha256": tokenizer.VOCAB_SHA256},
        "source": {"name": source.name, **source.about},
        "split": corpus.split,
        "separator": "<|endoftext|> before each document" if corpus.separated else "none",
        **counts,
    }
    known = corpora.compare_counts(manifest) if corpus.sha256 and not c.max_tokens else {}
    if any(found != expected for found, expected in known.values()):
        raise RunError(f"{source.name} has other counts than are known ({known}, found and known): update tiktoken")
    write_atomic(writer.folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def main(argv: Sequence[str]) -> None:
    c = parse(PrepareConfig, argv, "gpt2fast.prepare")
    start = time.perf_counter()
    m, new_tokens = prepare(c)
    about = m["source"]
    where = about.get("url") or (about["hub"]["path"] if "hub" in about else f"{', '.join(about['paths'])}")
    print(f"source               {about['name']}: {where}")
    print(f"documents            {m['documents']:,}" + (f" in {about['files']:,} files" if "files" in about else ""))
    print(f"tokens               {m['train']['tokens']:,} for training, {m['val']['tokens']:,} for validation")
    if not c.max_tokens:
        for name, (found, known) in corpora.compare_counts(m).items():
            print(
                f"known count          {found:,} {name}, "
                + ("as expected" if found == known else f"but {known:,} expected")
            )
    print(f"characters per token {m['characters_per_token']:.2f}")
    print(f"distinct tokens      {m['distinct_tokens']:,} of {VOCAB_SIZE:,}")
    print(
        f"unigram entropy      {m['unigram_entropy']:.3f} nats, the loss of a model that knows only token frequencies"
    )
    print(f"speed                {new_tokens / (time.perf_counter() - start):,.0f} tokens/s")
    if not m["val"]["tokens"]:
        print("note                 too little text for a validation split")
    print(f"next                 python -m gpt2fast.train --data {c.folder} --run {c.folder.name}")


if __name__ == "__main__":
    run_main(main)
