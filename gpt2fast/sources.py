"""Text files, .jsonl and .parquet, read as a stream of pieces that can be tokenised apart.

A piece is a whole document, or a stretch of one that ends where the tokenizer splits anyway: between a lone newline
and the character after it. So the tokens are those of the whole text, and memory stays small for a file of any size.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt2fast.errors import UserError

PIECE = 2**16  # characters
LONGEST_PIECE = 2**22  # a text without a single splittable newline is cut anyhow
ROWS_AT_ONCE = 1024
# GPT-2 splits "x\ny" into "x", "\n", "y"; a run of white space would be split differently at a piece's end.
_LONE_NEWLINE = re.compile(r"(?<=\S)\n(?=\S)")


class Piece(NamedTuple):
    """`first`: a document begins here. `val`: it belongs to the validation split. `size`: bytes of its file used up."""

    text: str
    first: bool
    val: bool
    size: int


def find(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files named, and below folders those with one of the suffixes, sorted. UserError if there are none."""
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            if not found:
                raise UserError(f"{path} holds no file ending in {', '.join(suffixes)}: name others with --suffixes")
        files += found
    return files


def read(files: Sequence[Path], field: str, val_every: int) -> Iterator[Piece]:
    """The pieces of all files. Every `val_every`th document is for validation; 0: none.

    A row of .jsonl and .parquet is a document, and so is a text file. Where there are fewer text files than
    `val_every`, it is the end of each that validates: the last 1/val_every.
    """
    texts = [file for file in files if file.suffix.lower() not in (".jsonl", ".parquet")]
    few = len(texts) < val_every
    documents = 0
    for file in files:
        try:
            size = file.stat().st_size
            if file in texts and few:
                yield from _text(file, size, tail=1 / val_every)
                continue
            rows = {".jsonl": _jsonl, ".parquet": _parquet}.get(file.suffix.lower())
            for piece in rows(file, size, field) if rows else _text(file, size):
                documents += piece.first
                yield piece._replace(val=val_every > 0 and documents % val_every == 0)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x}: {error.reason})"
            ) from None


def _text(file: Path, size: int, tail: float = 0.0) -> Iterator[Piece]:
    length = PIECE if not tail else max(1024, min(PIECE, int(size * tail / 2)))
    first, used, rest = True, 0, ""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        while True:
            chunk = stream.read(length)
            rest += chunk
            cut = _cut(rest) if chunk else len(rest)
            if cut:
                text, rest = rest[:cut], rest[cut:]
                val = tail > 0 and used >= (1 - tail) * size
                bytes_used = len(text.encode())
                used += bytes_used
                yield Piece(text, first, val, bytes_used)
                first = False
            if not chunk:
                return


def _cut(text: str) -> int:
    """Where to end a piece: behind the last lone newline; 0 if more text must be read first."""
    cut = 0
    for newline in _LONE_NEWLINE.finditer(text, max(0, len(text) - PIECE)):
        cut = newline.end()
    return cut if cut or len(text) < LONGEST_PIECE else len(text)


def _jsonl(file: Path, size: int, field: str) -> Iterator[Piece]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                what = (
                    f"has no field {field!r}: name it with --field"
                    if isinstance(error, KeyError)
                    else "is no JSON object"
                )
                raise UserError(f"{file}, line {number} {what}") from None
            yield Piece(_checked(text, f"{file}, line {number}", field), True, False, len(line))


def _parquet(file: Path, size: int, field: str) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow: pip install 'gpt2fast[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise UserError(f"{file} has no column {field!r}: name one of {columns} with --field")
            share = size // max(1, table.metadata.num_rows)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield Piece(_checked(text, str(file), field), True, False, share)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is no sound parquet file: {error}") from None


def _checked(text: object, where: str, field: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {type(text).__name__}, not text: name another with --field")
    return text
