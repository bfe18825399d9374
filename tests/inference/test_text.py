"""Text from a prompt: sample_text, which training calls."""

import pytest
import torch

from gpt2fast.data import tokenizer
from gpt2fast.inference import text
from gpt2fast.inference.decode import Sampling
from gpt2fast.inference.text import sample_text
from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from tests.tools import tiny

ENCODING = tokenizer.load()


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(tiny.GPT2_WORDS, build(OpsConfig()))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # without this, an untrained model gives another text for every seed
    return model


def test_the_text_is_the_prompt_and_its_continuation(model):
    """The prompt follows <|endoftext|>."""
    found = sample_text(model, "Hello", 7, precision="fp32", seed=3, sampling=Sampling(temperature=0))
    row = [tokenizer.EOT, *ENCODING.encode_ordinary("Hello")]
    for _ in range(7):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    assert found == ENCODING.decode(row[1:])


def test_the_seed_decides(model):
    texts = [sample_text(model, "a", 9, precision="fp32", seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_longer_than_the_window_does_not_stop_a_training_run(model):
    assert sample_text(model, "word " * 30, 2, precision="fp32", seed=0).startswith("word " * 30)


@torch.no_grad()
def test_the_text_ends_before_the_end_of_text_token(model, monkeypatch):
    tokens = torch.tensor([[*ENCODING.encode_ordinary(" there"), tokenizer.EOT, 1, 2]])
    seen = {}
    monkeypatch.setattr(text, "generate", lambda *args, **options: seen.update(options) or tokens)
    assert sample_text(model, "Hello", 4, precision="fp32", seed=3) == "Hello there"
    assert seen == {"seed": 3, "precision": "fp32", "stop": tokenizer.EOT, "record": False}
