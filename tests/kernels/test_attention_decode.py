"""Attention of one new token to a cache, in Triton and in torch, against softmax(q k^T) v."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gpt2fast import cpu, reference
from gpt2fast.kernels import cached_attention
from tests.tools.accuracy import assert_as_accurate
from tests.tools.inputs import DTYPES, normal

pytestmark = pytest.mark.kernel
IMPLEMENTATIONS = {"triton": cached_attention, "torch": reference.cached_attention, "cpu": cpu.cached_attention}


class Shape(NamedTuple):
    H: int
    S: int
    D: int
    positions: list[int]


# a program reads 128 keys at a time
SHAPES = {
    "GPT-2's": Shape(12, 192, 64, [130]),
    "the first token, and the last": Shape(2, 64, 32, [0, 63, 1]),
    "a block, one less and one more": Shape(2, 320, 32, [128, 127, 129, 256, 257]),
    "prime": Shape(3, 131, 37, [97, 5]),
    "least D": Shape(2, 40, 16, [39, 17, 20, 6]),
    "D not a power of two": Shape(2, 70, 80, [69, 33]),
    "largest D": Shape(1, 150, 256, [149]),
}


class Inputs(NamedTuple):
    qkv: Tensor
    k: Tensor
    v: Tensor
    position: Tensor
    H: int

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return copies, which may be overwritten."""
        return Inputs(*(x.to(dtype, copy=True) for x in self[:3]), *self[3:])


def inputs(shape: Shape, dtype=torch.float32, device="cpu") -> Inputs:
    H, S, D, positions = shape
    B = len(positions)
    k, v = (normal(B, H, S, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    return Inputs(normal(B, 3 * H * D, dtype=dtype, device=device), k, v, torch.tensor(positions, device=device), H)


def plain(x: Inputs) -> Tensor:
    """Compute row by row, with the keys up to the position and no mask."""
    D, rows = x.k.shape[3], []
    for b, p in enumerate(x.position.tolist()):
        q, k, v = x.qkv[b].view(3, x.H, 1, D)
        k, v = (torch.cat([cache[b, :, :p], new], 1) for cache, new in ((x.k, k), (x.v, v)))
        rows.append(((q @ k.mT * D**-0.5).softmax(-1) @ v).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_as_accurate_as_honest_arithmetic(name, shape, dtype, device):
    x = inputs(SHAPES[shape], DTYPES[dtype], device)
    got = x.to(x.k.dtype)
    o = IMPLEMENTATIONS[name](*got)
    base = plain(x.to(torch.float32)).to(x.k.dtype)
    if name != "triton" and dtype != "fp32":  # torch rounds the weights too
        base = plain(x.to(x.k.dtype))
    assert_as_accurate(o, plain(x.to(torch.float64)), base, name="o")
    D = x.k.shape[3]
    for i, cache in ((1, x.k), (2, x.v)):
        new = x.qkv.view(len(o), 3, x.H, D)[:, i]
        want = cache.clone()
        for b, p in enumerate(x.position.tolist()):
            want[b, :, p] = new[b]
        assert torch.equal(got[i], want)
    assert torch.equal(got.qkv, x.qkv)


@pytest.mark.parametrize("size", [1e-4, 100.0], ids=["all keys alike", "one key dominates"])
def test_other_scores(size, device):
    x = inputs(SHAPES["prime"], device=device)
    x.qkv[:, : 3 * 37] *= size
    assert_as_accurate(cached_attention(*x.to(torch.float32)), plain(x.to(torch.float64)), plain(x))


def test_the_cache_after_the_position_does_not_matter(device):
    x = inputs(SHAPES["prime"], device=device)
    want = cached_attention(*x.to(torch.float32))
    x.k[1, :, 6:], x.v[1, :, 6:] = torch.nan, torch.inf
    assert torch.equal(cached_attention(*x), want)


def test_a_row_has_the_same_bits_alone(device):
    x = inputs(SHAPES["a block, one less and one more"], device=device)
    alone = [cached_attention(*(part[b : b + 1].clone() for part in x[:4]), x.H) for b in range(5)]
    assert torch.equal(torch.cat(alone), cached_attention(*x))


def test_nan_in_means_nan_out(device):
    x = inputs(SHAPES["prime"], device=device)
    x.k[0, 1, 40, 3] = torch.nan  # row 0, head 1
    bad = cached_attention(*x).view(2, 3, 37).isnan()
    assert bad[0, 1].all()
    assert bad.sum() == 37


@pytest.mark.parametrize("position", [-1, 131, 2**40])
def test_a_position_outside_the_cache_is_never_an_address(position, device):
    x = inputs(SHAPES["prime"], device=device)
    x.position[0] = position
    k, v = x.k.clone(), x.v.clone()
    o = cached_attention(*x)
    assert o[0].isnan().all()
    assert o[1].isfinite().all()
    assert torch.equal(x.k[0], k[0])
    assert torch.equal(x.v[0], v[0])


def test_no_rows(device):
    x = inputs(SHAPES["prime"], device=device)
    assert cached_attention(*(part[:0] for part in x[:4]), x.H).shape == (0, 3 * 37)


def test_autocast(device):
    """It runs in autocast's dtype, which the caches must have."""
    x = inputs(SHAPES["prime"], torch.bfloat16, device)
    want = cached_attention(*x.to(torch.bfloat16))
    with torch.autocast(device.type, torch.bfloat16):
        got = cached_attention(x.qkv.float(), *x[1:])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_there_is_no_backward(device):
    x = inputs(SHAPES["prime"], device=device)
    x.qkv.requires_grad_()
    with pytest.raises(RuntimeError, match=r"cached_attention: it has no backward: call it under torch.no_grad\(\)"):
        cached_attention(*x)
    with torch.no_grad():
        assert not cached_attention(*x).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"qkv": torch.zeros(2, 3, 37)},
            ValueError,
            r"qkv has shape \(2, 3, 37\): it must be \(B, 3 \* 3 heads \* D\)",
        ),
        ({"H": 2}, ValueError, r"qkv has shape \(2, 333\): it must be \(B, 3 \* 2 heads \* D\)"),
        ({"qkv": torch.zeros(2, 9 * 8)}, ValueError, "heads have 8 dimensions: 16 to 256 are possible"),
        ({"k": torch.zeros(2, 3, 131, 36)}, ValueError, r"k_cache has shape .* it must be \(2, 3, 131, 37\)"),
        ({"v": torch.zeros(2, 3, 130, 37)}, ValueError, r"v_cache has shape .* it must be \(2, 3, 131, 37\)"),
        ({"v": torch.zeros(2, 131, 3, 37).transpose(1, 2)}, ValueError, "v_cache has strides .* must be contiguous"),
        ({"position": torch.zeros(3, dtype=torch.long)}, ValueError, r"position has shape \(3,\): it must be \(2,\)"),
        ({"position": torch.zeros(2)}, TypeError, "position is torch.float32: it must be int64"),
        ({"k": torch.zeros(2, 3, 131, 37).half()}, TypeError, "qkv is torch.float32 and k_cache is torch.float16"),
        ({"qkv": torch.zeros(2, 333).double()}, TypeError, "qkv is torch.float64: it must be float32"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(change, error, words):
    with pytest.raises(error, match=f"cached_attention: {words}"):
        cached_attention(*inputs(SHAPES["prime"])._replace(**change))
