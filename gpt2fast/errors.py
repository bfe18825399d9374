"""The one exception that means: the person can fix this. Its text names the value, the limit and the remedy."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A bad setting or bad data, found before anything is written. Shown as one line, without a traceback."""

    exit_code = 2


class RunError(UserError):
    """A run that had begun had to stop: full disk, no memory, a loss that is not finite."""

    exit_code = 1


def arguments() -> list[str]:
    """What stands on the command line. A -- before it keeps it from torchrun, which has options like --run itself."""
    return sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(argv)` as a program: a UserError becomes one line on stderr and its exit code."""
    try:
        code = main(arguments())
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
