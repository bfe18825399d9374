"""The two exceptions for faults that the user can fix. Their text names the value, the limit and the remedy."""

from typing import Any


class UserError(Exception):
    """A bad setting or bad data, found before anything is written. Shown as one line, without a traceback."""

    exit_code = 2


class RunError(UserError):
    """A run stopped after it had begun: the disk is full, memory ran out, a loss is not finite."""

    exit_code = 1


def one_line(error: BaseException | str) -> str:
    """Return the message of `error` on one line, with single spaces for all white space."""
    return " ".join(str(error).split())


def describe_error(error: BaseException, limit: int = 200) -> str:
    """Return the class and up to `limit` characters of the message of an unexpected error, on one line."""
    return f"{type(error).__name__}: {one_line(error)[:limit]}"


def check_at_least(settings: Any, **least: float) -> None:
    """Raise UserError if a setting, given by name with its limit, is below the limit or NaN; None passes."""
    for name, limit in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= limit:  # written so that NaN fails
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {limit}")
