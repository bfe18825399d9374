"""The loss of a whole split is the exact mean over its tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2fast.errors import UserError
from gpt2fast.inference import loss
from gpt2fast.inference.loss import split_loss
from gpt2fast.model import GPTConfig
from tests.tools.accuracy import assert_as_accurate
from tests.tools.hellaswag import build

T = 8
CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=211)
LENGTHS = [3 * T + 1, 30, 1, 0, 2, T, T + 1, 5]  # whole windows; tails; nothing to predict; one token to predict


def made_shards(lengths=LENGTHS):
    random = np.random.default_rng(0)
    return [random.integers(0, CONFIG.vocab_size, n).astype(np.uint16) for n in lengths]


@torch.no_grad()
def brute_force(model, shards):
    """Return the mean loss over all tokens, one window at a time, without padding."""
    losses = []
    for tokens in shards:
        tokens = torch.from_numpy(tokens.astype(np.int64))
        for start in range(0, len(tokens) - 1, T):
            window = tokens[start : start + T + 1]
            losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("B", [1, 3, 50])
def test_whole_split_is_the_mean_over_its_tokens(B):
    model = build(config=CONFIG)
    found = split_loss(model, made_shards(), B, T, "fp32")
    assert (found.tokens, found.whole) == (sum(n - 1 for n in LENGTHS if n), True)
    truth = brute_force(build(config=CONFIG).double(), made_shards())
    assert_as_accurate(torch.tensor(found.loss), truth, brute_force(model, made_shards()))


@pytest.mark.kernel
def test_triton_gives_the_same(device):
    got, expected = (
        split_loss(build(backend, CONFIG).to(device), made_shards(LENGTHS[:3]), 2, T, "fp32").loss
        for backend in ("triton", "torch")
    )
    assert got == pytest.approx(expected, rel=1e-5)


def test_each_token_but_a_shards_first_is_predicted_once_from_those_before_it():
    got, context = [], []
    for x, y in loss._batches(made_shards(), 3, T, CONFIG.vocab_size, range(100)):
        assert x.shape == y.shape
        assert x.shape[1] == T
        got += y[y != -100].tolist()
        context += x[y != -100].tolist()
    assert got == [token for tokens in made_shards() for token in tokens[1:]]
    assert context == [token for tokens in made_shards() for token in tokens[:-1]]


def test_the_first_batches_only():
    model = build(config=CONFIG)
    found = split_loss(model, made_shards([100]), 2, T, "fp32", max_batches=3)
    assert (found.tokens, found.whole) == (6 * T, False)
    assert found.loss == pytest.approx(split_loss(model, [made_shards([100])[0][: 6 * T + 1]], 2, T, "fp32").loss)
    assert split_loss(model, made_shards([100]), 2, T, "fp32", max_batches=7).whole


def test_a_signal_ends_it():
    answers = iter([False, False, True])
    assert split_loss(build(config=CONFIG), made_shards(), 1, T, "fp32", give_up=lambda: next(answers)) is None


def test_too_short_a_split_and_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(UserError, match="no two tokens"):
        split_loss(build(config=CONFIG), made_shards([1, 0]), 1, T, "fp32")
    with pytest.raises(UserError, match="token 300 at position 3"):
        split_loss(build(config=CONFIG), [np.array([1, 2, 3, 300], np.uint16)], 1, T, "fp32")
