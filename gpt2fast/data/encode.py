"""Pieces of text -> tokens, at the speed of tiktoken on all cores.

tiktoken lets go of Python's lock, so threads are enough. A thread takes a batch of pieces and gives arrays: tiktoken's
own encode_ordinary_batch gives lists of Python's integers, which are made under that lock, one after the other.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tiktoken

from gpt2fast.data.texts import Piece
from gpt2fast.data.tokenizer import EOT

BATCH_CHARACTERS = 2**17
AHEAD = 256  # batches that are read before the first is needed: threads have work while a shard is written


def encode_batches(
    pieces: Iterator[Piece],
    state: Callable[[], dict | None],
    encoding: tiktoken.Encoding,
    separated: bool,
    threads: int,
) -> Generator[tuple[list[Piece], list[np.ndarray], dict | None]]:
    """Pieces in batches, in order; their tokens; and what `state` gave when the last of them had been read."""
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[list[Piece], Future, dict | None]] = deque()
    try:
        for batch, behind in _batches(pieces, state):
            waiting.append((batch, pool.submit(encode_pieces, encoding, batch, separated), behind))
            while len(waiting) > AHEAD or (waiting and waiting[0][1].done()):
                batch, future, behind = waiting.popleft()
                yield batch, future.result(), behind
        for batch, future, behind in waiting:
            yield batch, future.result(), behind
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(pieces: Iterator[Piece], state: Callable[[], dict | None]) -> Iterator[tuple[list[Piece], dict | None]]:
    """Pieces to tokenise at a time, and the source's state behind them."""
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
    """Tokens of each piece, uint16: those of encode_ordinary, behind <|endoftext|> where a document begins."""
    arrays = []
    for piece in pieces:
        try:
            tokens = encoding.encode_to_numpy(piece.text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold
            tokens = np.array(encoding.encode_ordinary(piece.text))
        if separated and piece.first:
            tokens = np.concatenate([[EOT], tokens])
        arrays.append(tokens.astype(np.uint16))
    return arrays
