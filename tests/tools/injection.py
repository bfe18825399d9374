"""A simulated disk failure: call number k that touches a chosen file fails with the system's error."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2fast.weights import checkpoint


class Disk:
    """A counter of the calls that write to, sync, rename or make a path that contains `part`.

    Call number `k` fails with `code`; with ENOSPC so do all later ones, since a full disk stays full. A write that
    fails writes half of its content.
    """

    def __init__(self, part: str, k: int, code: int):
        self.part, self.k, self.code = part, k, code
        self.calls = 0

    def touch(self, path) -> bool:
        """Count a call, and return whether it must fail."""
        if self.part not in str(path):
            return False
        self.calls += 1
        return self.calls == self.k or (self.calls > self.k and self.code == errno.ENOSPC)

    def error(self, path=None) -> OSError:
        return OSError(self.code, os.strerror(self.code), *([str(path)] if path else []))

    @property
    def failed(self) -> bool:
        return self.calls >= self.k


class File:
    """A file open for writing, whose errors name no path, like the system's."""

    def __init__(self, file, disk: Disk):
        self._file, self._disk = file, disk

    def write(self, content):
        if self._disk.touch(self._file.name):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise self._disk.error()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@contextlib.contextmanager
def failing(part: str, k: int, code: int = errno.ENOSPC) -> Iterator[Disk]:
    """Let call number `k` that touches a path with `part` in it fail, within the context."""
    disk = Disk(part, k, code)
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "mkdir", "chmod")}
    real_open, real_save = io.open, checkpoint.save_file

    def by_path(name):
        def call(path, *args, **kwargs):
            reads = (
                name == "open" and code == errno.ENOSPC
            )  # os.open is used for reading only, which a full disk allows
            if not reads and disk.touch(args[0] if name in ("replace", "rename") else path):
                raise disk.error(path)
            return real[name](path, *args, **kwargs)

        return call

    def fsync(descriptor):
        if disk.touch(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise disk.error()
        real["fsync"](descriptor)

    def open_file(path, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+"):
            return real_open(path, mode, *args, **kwargs)
        if disk.touch(path):
            raise disk.error(path)
        return File(real_open(path, mode, *args, **kwargs), disk)

    def save_file(tensors, path):
        if disk.touch(path):
            Path(path).write_bytes(b"half of it")
            raise checkpoint.SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")
        real_save(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "replace", "rename", "mkdir", "chmod"):
            patch.setattr(os, name, by_path(name))
        patch.setattr(os, "fsync", fsync)
        patch.setattr(io, "open", open_file)
        patch.setattr(checkpoint, "save_file", save_file)
        yield disk


def every_call(part: str, code: int, most: int = 100) -> Iterator[contextlib.AbstractContextManager[Disk]]:
    """Yield `failing` with k = 1, 2, ... until nothing fails, because there are fewer than k calls."""
    for k in range(1, most):
        disks = []

        @contextlib.contextmanager
        def one(k=k, disks=disks):
            with failing(part, k, code) as disk:
                disks.append(disk)
                yield disk

        yield one()
        if not disks[0].failed:
            assert k > 1, f"no call touched {part}"
            return
    raise AssertionError(f"{part} was touched more than {most} times")
