"""How every program reads its command line and ends: frozen dataclass in, exit code out."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from gpt2fast.errors import UserError, one_line

Config = TypeVar("Config")


def parse(kind: type[Config], argv: Sequence[str], program: str, default: Config | None = None) -> Config:
    """The settings of `python -m gpt2fast.<program> argv`, an instance of the dataclass `kind`.

    A field without a default is a positional argument, unless `default` gives all of them one.
    """
    import tyro  # here: using a program's functions from Python needs no command-line library

    prog = f"python -m {program}"
    if default is None:
        return tyro.cli(kind, args=argv, prog=prog, config=(tyro.conf.PositionalRequiredArgs,))
    return tyro.cli(kind, args=argv, prog=prog, default=default)


def named_from():
    """The annotation that calls a flag --from, which is a keyword in Python.

    In a dataclass: `from_: "Annotated[Path | None, named_from()]" = None`.
    """
    import tyro

    return tyro.conf.arg(name="from")


def arguments() -> list[str]:
    """The command line. A -- before it keeps it from torchrun, which has options of the same names, such as --run."""
    return sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(argv)` as a program: a UserError becomes one line on stderr and its exit code."""
    try:
        code = main(arguments())
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
