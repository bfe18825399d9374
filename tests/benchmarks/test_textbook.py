"""The textbook's step, and others' models: the same GPT-2 as ours."""

import pytest
import torch

from benchmarks import textbook
from gpt2fast import ops
from gpt2fast.model import GPT, GPTConfig

MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)  # 20 more words are padding


@pytest.mark.parametrize("make", [textbook.textbook, textbook.hugging_face], ids=["textbook", "transformers"])
def test_opponents_compute_gpt2_with_our_weights(make):
    if make is textbook.hugging_face:
        pytest.importorskip("transformers", reason="it is the opponent")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=320)  # no padding: losses are equal
    ours = GPT(config, ops.build(ops.OpsConfig()))
    idx = torch.randint(320, (2, 17), generator=torch.Generator().manual_seed(0))
    theirs = make(ours)
    torch.testing.assert_close(theirs(idx[:, :-1], idx[:, 1:]), ours(idx[:, :-1], idx[:, 1:]))
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
