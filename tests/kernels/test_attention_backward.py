"""The backward of attention in one pass, chosen by hand; in test_attention_forward.py launch chooses."""

from functools import partial

import pytest
import torch

from gpt2fast.kernels import attention_forward, flash_attention, launch
from tests.tools import attention as both
from tests.tools.accuracy import outputs_and_gradients
from tests.tools.attention import Shape, check, qkv
from tests.tools.inputs import DTYPES

pytestmark = pytest.mark.kernel

# Tiles have 64 queries and 128 keys, and the interpreter has 2 processors
SHAPES = both.SHAPES | {
    "five heads for two programs": Shape(1, 5, 70, 200, 16),
    "three tiles of keys, queries fewer": Shape(1, 1, 150, 300, 16),
    "three tiles of keys, queries more": Shape(1, 1, 400, 300, 16),  # the first tile of queries sees no key
    "whole tiles": Shape(1, 1, 128, 256, 16),
    "one row": Shape(1, 1, 1, 2, 16),
}


@pytest.fixture
def one_pass(monkeypatch):
    monkeypatch.setattr(launch, "attention_one_pass", lambda *_: True)


def gradients(inputs, causal=True):
    return outputs_and_gradients(partial(flash_attention, causal=causal), inputs).gradients


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, causal, one_pass, device):
    check(*qkv(SHAPES[shape], torch.bfloat16, device), causal)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes(dtype, one_pass, device):
    check(*qkv(SHAPES["prime"], DTYPES[dtype], device))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_scores_far_below_zero(causal, one_pass, device):
    """exp(0 - lse) is infinite for the keys that pad the last tile: 0 * inf must not reach dq."""
    q, k, v = qkv(Shape(1, 1, 70, 150, 32), torch.float16, device)
    q, k = q * 0.1 + 30, k * 0.1 - 30
    assert (q.float() @ k.float().mT / 32**0.5).max() < -4000
    check(q, k, v, causal)


@pytest.mark.parametrize(
    "test",
    [
        partial(both.packed_is_flash_attention, 2, 130, 3, 64, "bf16"),
        both.any_strides,
        both.fully_masked_tiles_are_not_visited,
        partial(both.huge_logits, "fp16"),
        partial(both.values_that_are_all_equal, 40, 40, "fp16"),
    ],
    ids=["packed", "strides", "tiles not visited", "huge logits", "values all equal"],
)
def test_what_holds_for_both(test, one_pass, device):
    test(device=device)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_memory_that_was_never_written_is_not_read(causal, one_pass, device, monkeypatch):
    """New memory is filled with NaN: in the scratch it must not be read, in dq, dk and dv it must be overwritten."""
    inputs = qkv(Shape(1, 5, 200, 150, 16), torch.float16, device)
    want = gradients(inputs, causal)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **options: new_empty(*a, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **options: empty_like(*a, **options).fill_(torch.nan))
    for got, expected in zip(gradients(inputs, causal), want):
        assert torch.equal(got, expected)


def test_the_same_bits_whichever_program_has_a_head(one_pass, device, monkeypatch):
    inputs = qkv(Shape(1, 5, 70, 150, 16), torch.float16, device)
    want = gradients(inputs)
    for processors in (2, 1, 5):
        monkeypatch.setattr(launch, "processors", lambda device, n=processors: n)
        for got, expected in zip(gradients(inputs), want):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("one", [True, False])
def test_launch_chooses_the_kernels(one, device, monkeypatch):
    """The kernels that must not run are removed."""
    monkeypatch.setattr(launch, "attention_one_pass", lambda *_: one)
    for name in ("dq", "dkdv") if one else ("",):
        monkeypatch.delattr(attention_forward, f"_attention_bwd_{name}_kernel".replace("__", "_"))
    gradients(qkv(Shape(1, 1, 8, 8, 16), torch.float16, device))
