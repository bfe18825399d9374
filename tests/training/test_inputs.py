"""Inputs that cannot be used are refused before anything is written."""

from dataclasses import replace

import pytest

from gpt2fast.errors import UserError
from gpt2fast.train import train
from gpt2fast.training import inputs
from tests.tools import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    c = tiny.config(tmp_path_factory.mktemp("trained"))
    train(c)
    return c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 2}, r"n_layer is 1, not 2: add --model.n-layer 1"),
        (
            {"block_size": 32, "n_head": 4},
            r"n_head is 2, not 4, block_size is 16, not 32: add --model.n-head 2 --model",
        ),
        ({"vocab_size": 50304}, r"vocab_size is 256, not 50304"),
    ],
    ids=str,
)
def test_weights_of_another_size_are_refused_before_anything_is_written(trained, tmp_path, changes, message):
    c = tiny.config(tmp_path, init_from=str(trained.folder), model=replace(tiny.MODEL, **changes))
    with pytest.raises(UserError, match=message):
        train(c)
    assert not c.folder.exists()


def test_the_preset_that_fits_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(inputs.SIZES, "gpt2-tiny", tiny.MODEL)
    c = tiny.config(tmp_path, init_from=str(trained.folder), model=replace(tiny.MODEL, n_layer=2))
    with pytest.raises(UserError, match="does not fit the model: n_layer is 1, not 2: train the preset gpt2-tiny"):
        train(c)
