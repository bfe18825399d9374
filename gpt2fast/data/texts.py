"""Read text files, .jsonl and .parquet as a stream of pieces that can be tokenised separately.

A piece is a whole document, or a part of one that ends where the tokenizer splits anyway: between a single newline and
the character after it. So the tokens are those of the whole text, and memory stays small for a file of any size.
Text and .jsonl may be compressed with gzip (.txt.gz).
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gpt2fast.errors import RunError, UserError

PIECE = 2**16  # characters
LONGEST_LINE = 2**24  # bytes; a few kilobytes of .gz may unpack to a line of any length
LONGEST_PIECE = 2**22  # characters; a text that has no newline to split at is cut here
ROWS_AT_ONCE = 1024


class Piece(NamedTuple):
    """A part of a document.

    `first`: the document begins here. `val`: it is for validation. `read`: bytes read of all files so far.
    """

    text: str
    first: bool
    val: bool = False
    read: int = 0


def suffix_of(file: Path) -> str:
    """Return the suffix that says how to read a file: ".txt" for a.txt, a.TXT and a.txt.gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def find_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Return the named files, and from folders, at any depth, the files with one of `suffixes`, sorted.

    UserError if a path does not exist, or a folder holds no such file.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: name a file or a folder of text")
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if suffix_of(file) in suffixes and file.is_file())
            if not found:
                raise UserError(f"{path} holds no file ending in {', '.join(suffixes)}: name others with --suffixes")
        files += found
    return files


def read_pieces(files: Sequence[Path], field: str, val_every: int) -> Iterator[Piece]:
    """Yield the pieces of all files. Every `val_every`-th document is for validation; 0: none.

    A document is a row of .jsonl or .parquet, or a text file. If there are fewer text files than `val_every`, the last
    1/val_every of each is for validation instead.

    UserError if a file is not what its suffix says, RunError if it cannot be read.
    """
    few = sum(suffix_of(file) not in (".jsonl", ".parquet") for file in files) < val_every
    documents = before = 0
    for file in files:
        rows = {".jsonl": _jsonl, ".parquet": _parquet}.get(suffix_of(file))
        try:
            if few and not rows:
                pieces = _text(file, 1 / val_every)
            else:
                pieces = rows(file, field) if rows else _text(file)
            for piece in pieces:
                if rows or not few:
                    documents += piece.first
                    piece = piece._replace(val=val_every > 0 and documents % val_every == 0)
                yield piece._replace(read=before + piece.read)
            before += file.stat().st_size
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x}: {error.reason}): convert it to UTF-8"
            ) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file} is a damaged .gz file ({error}): copy or download it again") from None
        except OSError as error:
            raise RunError(f"{file} cannot be read ({error.strerror or error}): make it readable") from None


@contextlib.contextmanager
def _open(file: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a file: its uncompressed content, and a function that returns how many bytes of the file have been read."""
    with file.open("rb") as raw:
        if file.suffix.lower() == ".gz":
            with gzip.open(raw) as stream:
                yield stream, raw.tell  # type: ignore[misc]  # a GzipFile reads as any BinaryIO does
        else:
            yield raw, raw.tell


def _text(file: Path, tail: float = 0.0) -> Iterator[Piece]:
    size = _size(file) if tail else 0
    length = PIECE if not tail else max(1024, min(PIECE, int(size * tail / 2)))
    first, used, rest = True, 0, ""
    with _open(file) as (binary, tell), io.TextIOWrapper(binary, "utf-8-sig", newline="") as stream:
        while True:
            chunk = stream.read(length)
            rest += chunk
            cut = _cut(rest) if chunk else len(rest)
            if cut:
                text, rest = rest[:cut], rest[cut:]
                val = tail > 0 and used >= (1 - tail) * size
                used += len(text.encode()) if tail else 0
                yield Piece(text, first, val, tell())
                first = False
            if not chunk:
                return


def _size(file: Path) -> int:
    """The size of the uncompressed text in bytes."""
    with _open(file) as (stream, _):
        if isinstance(stream, gzip.GzipFile):
            return sum(map(len, iter(lambda: stream.read(2**20), b"")))
    return file.stat().st_size


def _cut(text: str) -> int:
    """Return where to end a piece: after the last single newline; 0 if more text must be read first.

    GPT-2 splits "x\\ny" into "x", "\\n", "y"; a run of white space would be split differently at a piece's end.
    """
    newline = text.rfind("\n", 0, len(text) - 1)
    while newline > max(0, len(text) - PIECE):
        if not text[newline - 1].isspace() and not text[newline + 1].isspace():
            return newline + 1
        newline = text.rfind("\n", 0, newline)
    return 0 if len(text) < LONGEST_PIECE else len(text)


def _jsonl(file: Path, field: str) -> Iterator[Piece]:
    with _open(file) as (stream, tell):
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise UserError(f"{file}, line {number} has {LONGEST_LINE:,} bytes or more: split that document")
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                what = (
                    f"has no field {field!r}: name another with --field"
                    if isinstance(error, KeyError)
                    else "is not a JSON object: repair or delete it"
                )
                raise UserError(f"{file}, line {number} {what}") from None
            yield Piece(check_text(text, f"{file}, line {number}", field), True, read=tell())


def _parquet(file: Path, field: str) -> Iterator[Piece]:
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
            size, rows, row = file.stat().st_size, table.metadata.num_rows, 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield Piece(check_text(text, f"{file}, row {row}", field), True, read=size * row // rows)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is a damaged parquet file ({error}): copy or download it again") from None


def check_text(text: object, where: str, field: str) -> str:
    """Return `text` if it is a str; else UserError."""
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {type(text).__name__}, not text: name another with --field")
    return text
