"""How every program reads its command line, into a frozen dataclass, and how it ends, with an exit code."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from gpt2fast.errors import UserError, one_line

Config = TypeVar("Config")


def parse(kind: type[Config], argv: Sequence[str], program: str, default: Config | None = None) -> Config:
    """Parse the flags `argv` of `python -m <program>` into an instance of the dataclass `kind`.

    A field without a default is a positional argument, unless `default` is given, which has a value for every field.
    """
    import tyro  # here, so that a program's functions can be used from Python without it

    prog = f"python -m {program}"
    if default is None:
        return tyro.cli(kind, args=argv, prog=prog, config=(tyro.conf.PositionalRequiredArgs,))
    return tyro.cli(kind, args=argv, prog=prog, default=default)


def named_from():
    """Return the annotation that names a flag --from: `from` is a keyword in Python.

    Use in a dataclass: `from_: "Annotated[Path | None, named_from()]" = None`.
    """
    import tyro

    return tyro.conf.arg(name="from")


def arguments() -> list[str]:
    """Return the command line without its first --, which keeps torchrun from reading a flag such as --run."""
    return sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(argv)` as a program. A UserError becomes one line on stderr and its exit code."""
    try:
        code = main(arguments())
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
