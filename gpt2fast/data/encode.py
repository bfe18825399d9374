"""Encode pieces of text with tiktoken on all cores.

tiktoken releases Python's lock, so threads are enough. Each thread encodes a batch of pieces into NumPy arrays:
tiktoken's own encode_ordinary_batch returns lists of Python integers, which are built one at a time under that lock.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tiktoken

from gpt2fast.data.texts import Piece
from gpt2fast.data.tokenizer import EOT

BATCH_CHARACTERS = 2**17
AHEAD = 256  # batches read in advance, so that threads have work while a shard is written


def encode_batches(
    pieces: Iterator[Piece],
    state: Callable[[], dict | None],
    encoding: tiktoken.Encoding,
    separated: bool,
    threads: int,
) -> Generator[tuple[list[Piece], list[np.ndarray], dict | None]]:
    """Yield batches in order: the pieces, the tokens of each, and what `state()` returned after the last was read."""
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[list[Piece], Future, dict | None]] = deque()
    try:
        for batch, after in _batches(pieces, state):
            waiting.append((batch, pool.submit(encode_pieces, encoding, batch, separated), after))
            while len(waiting) > AHEAD or (waiting and waiting[0][1].done()):
                batch, future, after = waiting.popleft()
                yield batch, future.result(), after
        for batch, future, after in waiting:
            yield batch, future.result(), after
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(pieces: Iterator[Piece], state: Callable[[], dict | None]) -> Iterator[tuple[list[Piece], dict | None]]:
    """Yield the pieces to tokenise together, and the source's state after the last of them."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch, state()
            batch, characters = [], 0
    if batch:
        yield batch, state()


def encode_pieces(encoding: tiktoken.Encoding, pieces: Sequence[Piece], separated: bool) -> list[np.ndarray]:
    """Return the tokens of each piece, (n,) uint16: encode_ordinary's, after <|endoftext|> where a document begins."""
    arrays = []
    for piece in pieces:
        try:
            tokens = encoding.encode_to_numpy(piece.text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which JSON may contain
            tokens = np.array(encoding.encode_ordinary(piece.text))
        if separated and piece.first:
            tokens = np.concatenate([[EOT], tokens])
        arrays.append(tokens.astype(np.uint16))
    return arrays
