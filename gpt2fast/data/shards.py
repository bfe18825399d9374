"""Open, check and write token shards.

A shard is a file of GPT-2 tokens. Three formats are read, and told apart by their first bytes; the first is written:

    llm.c, modded-nanogpt  .bin   256 int32: 20240520, 1, number of tokens, zeros; then uint16 tokens
    build-nanogpt          .npy   one-dimensional uint16 NumPy array
    nanoGPT                .bin   uint16 tokens and nothing else

They cannot be confused: the first uint16 of 20240520 is 55432, which is not a GPT-2 token. All integers are
little-endian. Files are memory-mapped; only the tokens of a batch are read.

Sources: dev/data/data_common.py of github.com/karpathy/llm.c, fineweb.py of github.com/karpathy/build-nanogpt,
data/openwebtext/prepare.py of github.com/karpathy/nanoGPT.
"""

import mmap
from pathlib import Path

import numpy as np

from gpt2fast.errors import RunError, UserError
from gpt2fast.files.checked import open_file
from gpt2fast.files.containers import check_npy

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
SCAN_TOKENS = 2**24  # tokens of a shard whose range is checked at start-up; the rest is checked batch by batch


def open_shard(path: Path, vocab_size: int) -> np.ndarray:
    """Return a shard's tokens, (n,) uint16, memory-mapped.

    UserError if size or header is wrong, or one of the first SCAN_TOKENS tokens is not below `vocab_size`.
    """
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
        raise UserError(f"shard {path} cannot be read ({error.strerror or error}): make it readable") from None
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
        raise UserError(f"shard {path} holds {tokens.dtype} of shape {tokens.shape}: write one-dimensional uint16")
    return tokens


def _open_llmc(path: Path, head: bytes, size: int) -> np.ndarray:
    if len(head) < HEADER_BYTES:
        raise UserError(
            f"shard {path} is truncated: {size} bytes are less than its header of {HEADER_BYTES}: copy it again"
        )
    version, n = (int(value) for value in np.frombuffer(head, "<i4")[1:3])
    if version != VERSION:
        raise UserError(f"shard {path} has version {version}, not {VERSION} (uint16 tokens): write it in that version")
    if n < 0 or size != HEADER_BYTES + 2 * n:
        raise UserError(
            f"shard {path} is truncated or padded: its header counts {n} tokens, which take {HEADER_BYTES + 2 * n} "
            f"bytes, but it has {size}: copy or write it again"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(n,)) if n else np.empty(0, "<u2")


def _open_raw(path: Path, head: bytes, size: int, vocab_size: int) -> np.ndarray:
    if size % 2:
        raise UserError(
            f"shard {path} has {size} bytes, an odd number, and uint16 tokens take two each: write it again"
        )
    first = int(np.frombuffer(head[:2], "<u2")[0])
    if first >= vocab_size:
        magic = int.from_bytes(head[:4], "little")
        raise UserError(
            f"shard {path} has the wrong magic {magic}: llm.c shards begin with {MAGIC}, NumPy's with \\x93NUMPY, "
            f"and as plain uint16 its first token {first} is not below {vocab_size}"
        )
    return np.memmap(path, "<u2", "r")


def read_tokens(shard: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return shard[start:stop]. RunError if its file has become shorter since it was mapped.

    Reading a map past the end of its file is SIGBUS, which ends Python without a message. A deleted file stays whole as
    long as it is mapped.
    """
    if isinstance(shard.base, mmap.mmap) and shard.base.size() < shard.offset + shard.nbytes:
        raise RunError(
            f"shard {shard.filename} has been cut to {shard.base.size()} bytes, of {shard.offset + shard.nbytes}, "
            "while it was read: restore it, then continue with --resume"
        )
    return shard[start:stop]


def check_tokens(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise UserError if a token is not below `vocab_size`: an embedding would read past its table."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        i = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{where}: token {int(tokens.flat[i])} at position {i} is not below the vocabulary of {vocab_size}: "
            "prepare the text again, or name the model that belongs to it"
        )


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write (n,) uint16 tokens in llm.c's format. Not atomic: prepare renames the folder of all shards."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, "<u2").tobytes())
