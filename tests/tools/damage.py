"""Damage small valid files at random: bytes, JSON values, members of zip files.

A damaged file should be nearly valid: random bytes are refused by the first check, which leaves the others untested.
"""

import copy
import functools
import gzip
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

INTS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62,
        2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63), 10**9, 10**12, 10**30, 10**400)  # fmt: skip
FLOATS = (float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, 0.5, 2.0)
TEXTS = ("", ".", "..", "/", "../x", "/etc/passwd", "a\0b", "\ud800", "\u202e", "x" * 300, "NaN", "1", "None",
         "\x1b[2J", "a/b", "-1", "gpt2", "torch", "٣")  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], {"": None}, [None] * 4, [0] * 8, {"a": {"b": 1}})
WORDS = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\n",
    b'"',
    b"{",
    b"[",
    b"\xff\xff\xff\xff\x7f",
    b"\x80" * 12,
    b"PK\x03\x04",
    b"\r\n",
)
ODD = ("missing", "empty", "fifo", "folder", "/dev/zero", "/nowhere", "itself")  # what may replace a file
Files = dict[str, bytes | str]  # name -> content, or one of ODD
HEAD = 512  # bytes that contain the header


def value(random: Random) -> object:
    """Draw a JSON value; few fit any field."""
    return copy.deepcopy(random.choice(random.choice((INTS, FLOATS, TEXTS, OTHERS))))


def in_json(random: Random, data: bytes) -> bytes:
    """Replace a value, change a name, drop or repeat an item, or damage the text itself."""
    tree = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        holder, places = None, [(None, None)]
        _collect(tree, places)
        holder, name = random.choice(places)
        how = random.random()
        if holder is None:
            tree = value(random) if how < 0.3 else tree
        elif how < 0.7:
            holder[name] = value(random)
        elif how < 0.8 and isinstance(holder[name], int):
            holder[name] += random.choice((-1, 1))
        elif how < 0.9:
            del holder[name]
        elif isinstance(holder, dict):
            holder[str(value(random))[:300]] = holder.pop(name)
        else:
            holder.append(holder[name])
    text = json.dumps(tree).encode()
    how = random.random()
    if how < 0.03:
        return text.replace(b":", b":" + b"[" * 200_000, 1)
    if how < 0.06:
        return text.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    if how < 0.09:
        return text.replace(b":", b": " + b"9" * 5000 + b', "z":', 1)
    return in_bytes(random, text) if how < 0.2 else text


def _collect(tree: object, places: list) -> None:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in children:
        if len(places) < 300:
            places.append((tree, name))
            _collect(child, places)


def in_bytes(random: Random, data: bytes) -> bytes:
    """Flip bits, overwrite integers, cut, repeat or move parts: mostly near the beginning or the end."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        n = len(data)
        if not n:
            return random.choice(WORDS)
        end = random.choice((min(n, 16), min(n, 64), min(n, HEAD), n))
        i = random.randrange(end) if random.random() < 0.8 else n - 1 - random.randrange(end)
        how = random.randrange(8)
        if how == 0:
            data[i] ^= 1 << random.randrange(8)
        elif how == 1:
            data[i] = random.randrange(256)
        elif how == 2:
            width = random.choice((1, 2, 4, 8))
            i -= i % width
            number = random.choice(INTS) + random.choice((-1, 0, 0, 0, 1))
            data[i : i + width] = (number % 256**width).to_bytes(width, "little")
        elif how == 3:
            del data[random.randrange(n) :]
        elif how == 4:
            data += random.choice((b"\0", random.randbytes(3), bytes(random.randrange(5000)), bytes(data[:HEAD])))
        elif how == 5:
            del data[i : i + random.choice((1, 2, 4, 100))]
        elif how == 6:
            data[i:i] = random.choice(WORDS)
        else:
            j = random.randrange(n)
            data[i : i + 8] = data[j : j + 8]
    return bytes(data)


def in_digits(random: Random, data: bytes) -> bytes:
    """Replace one of the numbers that a text header writes in digits."""
    places = [i for i, byte in enumerate(data[: 4 * HEAD]) if 48 <= byte < 58]
    if not places:
        return in_bytes(random, data)
    i = random.choice(places)
    number = random.choice((b"0", b"-1", b"9", b"99999999", b"18446744073709551615", b"1e9", b"9" * 40))
    return data[:i] + number + data[i + 1 :]


def in_zip(random: Random, data: bytes, damage: Callable[[Random, bytes], bytes]) -> bytes:
    """Damage, drop, repeat, rename or inflate a member; checksums and directory are then made to fit again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    i = random.randrange(len(members))
    name, content = members[i]
    how = random.random()
    if how < 0.7:
        members[i] = name, damage(random, content)
    elif how < 0.8:
        del members[i]
    elif how < 0.88:
        members[i] = random.choice(("../" + name, "/" + name, name + "x", "a\\b", ".")), content
    elif how < 0.94:
        members.append((name, damage(random, content)))
    else:
        members[i] = name, content + bytes(2**28 if random.random() < 0.1 else 2**16)
    file = io.BytesIO()
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with (
        zipfile.ZipFile(file, "w", kind) as new,
        warnings.catch_warnings(action="ignore"),
    ):  # it warns of a name that is there twice
        for name, content in members:
            new.writestr(name, content, zipfile.ZIP_DEFLATED if len(content) > 2**20 else None)
    return file.getvalue()


@dataclass(frozen=True)
class Target:
    """A reader to test: `make` returns valid files, `call` reads them from a folder, `mend` repairs checksums."""

    make: Callable[[], Files]
    call: Callable[[Path], object]
    mend: Callable[[Files], Files] = lambda files: files
    writes: bool = False  # may write into its folder

    @functools.cached_property
    def sound(self) -> Files:
        return self.make()

    def case(self, random: Random) -> Files:
        """Draw damaged files."""
        files = dict(self.sound)
        for _ in range(random.choice((1, 1, 1, 2))):
            name = random.choice(sorted(files))
            odd = random.random() < 0.03
            files[name] = random.choice(ODD) if odd else in_file(random, name, self.sound[name])
        return self.mend(files) if random.random() < 0.8 else files


def in_file(random: Random, name: str, content: bytes) -> bytes:
    """Damage a file in a way that suits its format."""
    how = random.random()
    if name.endswith(".json"):
        return in_json(random, content)
    if name.endswith(".gz"):
        inner = in_file(random, name.removesuffix(".gz"), gzip.decompress(content))
        return gzip.compress(inner, mtime=0) if how < 0.7 else in_bytes(random, content)
    if name.endswith(".jsonl"):
        lines = content.splitlines(keepends=True)
        i = random.randrange(len(lines))
        lines[i] = in_json(random, lines[i]) + b"\n"
        return b"".join(lines) if how < 0.8 else in_bytes(random, content)
    if content[:2] == b"PK" and how < 0.7:
        return in_zip(random, content, lambda random, member: in_file(random, "", member))
    if name.endswith(".safetensors") and how < 0.7:
        n = int.from_bytes(content[:8], "little")
        head = in_json(random, content[8 : 8 + n])
        return len(head).to_bytes(8, "little") + head + content[8 + n :]
    if content[:6] == b"\x93NUMPY" and how < 0.5:
        return in_digits(random, content)
    return in_bytes(random, content)


def write(files: Files, folder: Path) -> None:
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "empty":
            path.touch()
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        elif content != "missing":
            path.symlink_to(path if content == "itself" else content)
