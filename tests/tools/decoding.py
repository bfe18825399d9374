"""A model and prompts for decoding, and a token that ends some of the rows."""

import torch

from gpt2fast.inference.decode import Sampling, generate
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build
from tests.tools.inputs import randomise

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=211)
GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 14, 15], [92], [65, 35, 89, 79, 32, 38, 46], [26, 43]]


def make(config: GPTConfig = CONFIG, backend: str = "torch", device: torch.device | str = "cpu") -> GPT:
    model = GPT(config, build(OpsConfig().with_backend(backend), torch.device(device).type))
    randomise(model, 0.3, 1)
    return model.to(device)


def ending(model: GPT, n: int) -> tuple[list[list[int]], int]:
    """Return what the rows write without a stop, and a token that two of them, not all, write at different places."""
    rows = generate(model, PROMPTS, n, GREEDY).tolist()
    for token in rows[0][2:]:
        places = {row.index(token) for row in rows if token in row}
        if len(places) > 1 and sum(token in row for row in rows) < len(rows):
            return rows, token
    raise AssertionError("no such token: use other weights")
