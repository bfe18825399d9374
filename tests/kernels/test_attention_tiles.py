"""The tiles that attention visits, and the keys that they see: no later ones, to the last bit."""

import pytest
import torch

from gpt2fast.kernels import flash_attention
from tests.tools.attention import Shape, qkv

pytestmark = pytest.mark.kernel


def test_the_future_does_not_matter_to_the_last_bit(device):
    q, k, v = qkv(Shape(1, 1, 150, 150, 64), torch.float16, device)
    o = flash_attention(q, k, v)
    for t in (0, 63, 64, 127, 128, 148):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, t + 1 :] = 7.0
        assert torch.equal(flash_attention(*later)[:, :, : t + 1], o[:, :, : t + 1])
        assert not torch.equal(flash_attention(*later)[:, :, t + 1 :], o[:, :, t + 1 :])


def test_rows_are_convex_combinations(device):
    q, k, v = qkv(Shape(1, 2, 140, 140, 32), torch.float32, device)
    o = flash_attention(q, k, v)
    assert (o <= v.cummax(2).values + 1e-5).all()
    assert (o >= v.cummin(2).values - 1e-5).all()
    torch.testing.assert_close(flash_attention(q, k, torch.ones_like(v)), torch.ones_like(v), rtol=0, atol=1e-6)


def test_a_nan_in_a_query_stays_in_its_row_and_one_in_a_key_in_later_rows(device):
    q, k, v = qkv(Shape(1, 1, 70, 70, 32), torch.float32, device)
    q[0, 0, 5] = float("nan")
    k[0, 0, 66] = float("nan")
    rows = flash_attention(q, k, v).isnan().any(-1)[0, 0]
    assert rows.nonzero().flatten().tolist() == [5, 66, 67, 68, 69]
