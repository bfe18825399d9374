"""A finished run, and its weights, for the tests that read one."""

import pytest

from gpt2fast.train import train
from gpt2fast.training.config import TrainConfig
from gpt2fast.weights import load
from gpt2fast.weights.foreign import Weights
from tests.tools import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> TrainConfig:
    """Return the settings of a finished run."""
    c = tiny.config(tmp_path_factory.mktemp("finished"), model=tiny.GPT2_WORDS)
    train(c)
    return c


@pytest.fixture(scope="module")
def weights(finished) -> Weights:
    return load.read_weights(finished.folder)
