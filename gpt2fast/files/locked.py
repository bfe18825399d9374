"""Let one process at a time work in a folder. The system frees the lock, also after kill -9."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gpt2fast.errors import UserError


@contextlib.contextmanager
def locked(folder: Path, otherwise: str = "choose another folder with --out") -> Iterator[None]:
    """Make the folder if need be, and hold the lock in it.

    UserError if another process holds it, with the remedy `otherwise`, or if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process: wait for it, or {otherwise}") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder with --out") from None
    try:
        yield
    finally:
        lock.release()
