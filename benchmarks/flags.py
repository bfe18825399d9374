"""The command line of a benchmark, from a frozen dataclass: by tyro, or by argparse where tyro is not installed.

A machine that is rented to measure has torch and Triton, and often nothing else: there the flags are the same, but
`--help` shows them without their descriptions.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gpt2fast import command

Size = Literal["nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]  # the names in model.SIZES
AnyPrecision = Literal["auto", "fp32", "bf16", "fp16"]
Config = TypeVar("Config")


def parse(kind: type[Config], argv: Sequence[str], program: str) -> Config:
    """The settings of `python -m program argv`, an instance of the dataclass `kind`; every field has a default."""
    try:
        return command.parse(kind, argv, program)
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
    return parse_plainly(kind, argv, program)


def parse_plainly(kind: type[Config], argv: Sequence[str], program: str) -> Config:
    """The same without tyro."""
    p = argparse.ArgumentParser(
        prog=f"python -m {program}", description=kind.__doc__, epilog="pip install tyro: then this describes each flag."
    )
    hints = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]  # mypy knows no bound for "a dataclass"
        options = _options(hints[field.name])
        help = "default: %(default)s"
        p.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=help, **options)
    values = vars(p.parse_args(argv))
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _options(hint: Any) -> dict[str, Any]:
    """What `add_argument` needs for a field of this type: one of those that benchmarks use."""
    inner = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is Literal:
        return {"choices": inner}
    if get_origin(hint) is tuple:  # tuple[int, ...]
        return _options(inner[0]) | {"nargs": "*"}
    if inner:  # int | None
        return _options(inner[0])
    return {"action": argparse.BooleanOptionalAction} if hint is bool else {"type": hint}
