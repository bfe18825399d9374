"""Write files and folders that are complete or absent, even after a power cut."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gpt2fast.errors import UserError


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Give `path` to an OSError from within: a failed write or fsync knows only a file descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by a file with this content: write under a temporary name, sync, rename. OSError names `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with named(path):
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def check_new(path: Path) -> None:
    """Raise UserError if `path` exists or cannot be made: better before an hour of work than after it."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} already exists: choose another with --out")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}, since {folder} is not a folder to write to: choose another with --out")


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name after everything in it has reached the disk."""
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    os.rename(temporary, final)
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so a kill midway never leaves a folder that looks complete."""
    rubbish = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(rubbish, ignore_errors=True)
    os.rename(folder, rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync a file or a folder. Windows cannot open folders; it orders renames by itself."""
    if os.name == "nt" and path.is_dir():
        return
    with named(path):
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
