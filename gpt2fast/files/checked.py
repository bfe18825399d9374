"""Read JSON that someone else may have written, up to a size, and check its types."""

import json
import stat
from collections.abc import Mapping
from dataclasses import fields
from io import BufferedReader
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

LARGEST = 2**22  # bytes; parsed, a list of empty lists takes 20 times as much memory
_INT = 2**63


def open_file(path: Path) -> BufferedReader:
    """Open a regular file, also through a link. OSError on anything else: a pipe blocks, and /dev/zero has no end."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "not a regular file", str(path))
    return path.open("rb")


def read_json(path: Path) -> Any:
    """Parse a JSON file. OSError if it cannot be read; ValueError as `parse_json`, or above `LARGEST` bytes."""
    with open_file(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """Parse JSON. ValueError if it is invalid, nested too deeply, or has a name twice in one object."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which of the two values they take
        raise ValueError("an object has a name twice")
    return found


def fill(cls: type, values: object) -> Any:
    """Make a dataclass of plain fields from parsed JSON. ValueError on an unknown name, or a value of another type.

    TypeError if a field without a default is missing.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} is a {type(values).__name__}: an object is needed")
    types = {field.name: field.type for field in fields(cls)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{cls.__name__} has no {str(name)[:60]!r}")
        check(name, value, types[name])
    return cls(**values)


def check(name: str, value: object, annotation: Any) -> None:
    """Raise ValueError unless `value` has the type that a field's annotation says."""
    if not _fits(value, annotation):
        wanted = getattr(annotation, "__name__", str(annotation))
        raise ValueError(f"{name} is {str(value)[:60]!r}: {wanted} is needed")


def _fits(value: object, annotation: Any) -> bool:
    kind = get_origin(annotation)
    if kind is Literal:
        return isinstance(value, str) and value in get_args(annotation)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(annotation))
    if kind is dict:
        name, each = get_args(annotation)
        return isinstance(value, dict) and all(_fits(k, name) and _fits(v, each) for k, v in value.items())
    if annotation is NoneType:
        return value is None
    if annotation in (int, float):  # true is not 1, and a larger integer fits into no tensor
        numbers = (int,) if annotation is int else (int, float)
        return type(value) in numbers and not (type(value) is int and not -_INT <= value < _INT)
    return isinstance(value, annotation)
