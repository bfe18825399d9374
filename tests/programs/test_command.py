"""The flag --from, whose name is a keyword in Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from gpt2fast.command import named_from

tyro = pytest.importorskip("tyro", reason="needs tyro for the command line")


@dataclass
class Config:
    from_: Annotated[Path | None, named_from()] = None


def test_the_flag_is_named_from():
    assert tyro.cli(Config, args=["--from", "a.txt"]).from_ == Path("a.txt")
    assert tyro.cli(Config, args=[]).from_ is None
