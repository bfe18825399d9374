"""A folder with data, and in it a finished run of one process, shared by the tests of a file."""

import os

import pytest

from gpt2fast import train
from tests.tools import ranks, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data in several shards, for the runs of all tests of the file."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.write_data(folder / "data", n=700)
    tiny.write_data(folder / "more", n=530, seed=1)
    os.rename(folder / "more/train.bin", folder / "data/train_2.bin")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The rows of metrics.jsonl of the run "alone", with one process."""
    ranks.run(train.main, 1, folder, [*ranks.FLAGS, "--run", "alone"])
    return ranks.metrics(folder, "alone")
