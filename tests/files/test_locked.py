"""One process at a time works in a folder."""

import pytest
from filelock import FileLock

from gpt2fast.errors import UserError
from gpt2fast.train import train
from tests.tools import tiny


def test_a_second_run_in_a_folder_is_refused(folder):
    c = tiny.config(folder)
    c.folder.mkdir(parents=True)
    with FileLock(c.folder / "lock"), pytest.raises(UserError, match="in use by another process"):
        train(c)
    assert {path.name for path in c.folder.iterdir()} <= {"lock"}
