"""With the cache and without it, the logits are the same at every position."""

import pytest
import torch

from gpt2fast.inference.cache import Cache
from gpt2fast.machine.device import DTYPES, autocast
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build
from tests.tools.accuracy import assert_as_accurate
from tests.tools.inputs import randomise

pytestmark = pytest.mark.kernel

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=40, block_size=32, vocab_size=211)
LENGTHS = [5, 9, 1]  # tokens of each row's prompt
T = 24


def make(backend: str, device: torch.device) -> GPT:
    model = GPT(CONFIG, build(OpsConfig().with_backend(backend), device.type))
    randomise(model, 0.1, 0)
    return model.to(device)


def tokens(device: torch.device) -> torch.Tensor:
    return torch.randint(211, (len(LENGTHS), T), generator=torch.Generator().manual_seed(1)).to(device)


def cached_logits(model: GPT, idx: torch.Tensor, dtype: torch.dtype) -> dict[tuple[int, int], torch.Tensor]:
    """Return (row, position) -> logits for the last token of each prompt and every position after it."""
    B, longest, logits = len(idx), max(LENGTHS), {}
    cache = Cache(model, B, T, dtype)
    padded = idx[:, :longest].clone()
    for row, length in zip(padded, LENGTHS):
        row[length:] = 7  # padding
    h = model.hidden(padded, attends=cache.filling())
    for b, length in enumerate(LENGTHS):
        logits[b, length - 1] = model.logits(h[b, length - 1])
    length = torch.tensor(LENGTHS, device=idx.device)
    for i in range(T - longest):
        position = length + i
        newest = idx.gather(1, position[:, None]).T
        h = model.hidden(newest, model.wpe.weight[position], cache.reading(position))[0]
        for b, p in enumerate(position.tolist()):
            logits[b, p] = model.logits(h[b])
    return logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(backend, precision, device):
    idx = tokens(device)
    truth = make("torch", device).double()(idx)
    model = make(backend, device)
    with autocast(device, precision):
        base, got = model(idx), cached_logits(model, idx, DTYPES[precision])
    assert len(got) == sum(T - max(LENGTHS) + 1 for _ in LENGTHS)
    places = list(got)
    got = torch.stack([got[place] for place in places])
    truth, base = (torch.stack([logits[place] for place in places]) for logits in (truth, base))
    assert_as_accurate(got, truth, base, name="logits")


@torch.no_grad()
def test_the_cache_has_aligned_positions(device):
    cache = Cache(make("torch", device), 2, 65, torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 2, 2, 128, 20)
    assert cache.k.dtype == torch.bfloat16
