"""JSON that someone else may have written: read within a bound, and held against the types that it must have."""

import json
import stat
from collections.abc import Mapping
from dataclasses import fields
from io import BufferedReader
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

LARGEST = 2**22  # bytes: parsed, a list of empty lists takes 20 times as many
_INT = 2**63


def open_file(path: Path) -> BufferedReader:
    """OSError on what is no file, also behind a link: a pipe would be waited for, /dev/zero has no end."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "no regular file", str(path))
    return path.open("rb")


def read_json(path: Path) -> Any:
    """OSError if it cannot be read; ValueError if it is no JSON, larger than `LARGEST`, or names a thing twice."""
    with open_file(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """ValueError on what is no JSON."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which of the two they take
        raise ValueError("a name stands there twice")
    return found


def fill(cls: type, values: object) -> Any:
    """A dataclass of plain fields from JSON. ValueError on a name that it lacks, or a value of another type."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} is a {type(values).__name__}: names and values are needed")
    types = {field.name: field.type for field in fields(cls)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{cls.__name__} has no {str(name)[:60]!r}")
        check(name, value, types[name])
    return cls(**values)


def check(name: str, value: object, annotation: Any) -> None:
    """ValueError unless `value` is what the annotation of a field says."""
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
    if annotation in (int, float):  # true is no 1, and what is larger fits into no tensor
        numbers = (int,) if annotation is int else (int, float)
        return type(value) in numbers and not (type(value) is int and not -_INT <= value < _INT)
    return isinstance(value, annotation)
