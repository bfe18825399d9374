"""Launch settings: pure functions of shapes and of the device."""

import pytest
import torch

from gpt2fast.kernels import launch

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize(("gib", "chunks"), [(0, 7), (8, 7), (24, 5), (80, 2), (139, 1)])
def test_chunks_by_the_devices_memory(gib, chunks, monkeypatch):
    """0 is the interpreter's memory: it must take the loop."""
    monkeypatch.setattr(launch, "memory", lambda device: gib * 2**30)
    rows = launch.head_rows(65536, 50304, 2, launch.head_budget(torch.device("cuda")))
    assert -(-65536 // rows) == chunks


def test_the_rule_of_chunks():
    """Chunks have at most 2^30 bytes of logits, and are equal, in whole tiles of 128 rows."""
    assert launch.head_rows(65536, 50304, 2) == 9472  # 7 chunks of B=64, T=1024
    assert launch.head_rows(1024, 50304, 2) == 1024  # one
    assert launch.head_rows(65536, 50304, 4) == 5120  # 13 in fp32
    assert launch.head_rows(1, 50304, 2) == 1
    assert launch.head_rows(0, 50304, 2) == 1
    for N, V, itemsize in ((65536, 50304, 2), (12345, 50304, 4), (10**6, 128256, 2)):
        rows = launch.head_rows(N, V, itemsize)
        assert (rows - 128) * V * itemsize <= 2**30
        assert rows % 128 == 0


SM_90 = {"processors": 132, "l2_cache": 50 << 20, "capability": (9, 0)}


@pytest.mark.parametrize(
    ("one", "changes"),
    [
        (True, {}),
        (True, {"heads": 64 * 25}),  # 12.1 heads per processor
        (True, {"heads": 132}),
        (False, {"heads": 140}),  # 2 rounds, the second one for 8 of 132
        (False, {"heads": 48}),
        (True, {"T_q": 1100}),
        (False, {"T_q": 1200}),  # 41 MB in a cache of 52 MB: too much
        (True, {"T_q": 2048, "l2_cache": 126 << 20, "capability": (10, 0)}),
        (False, {"D": 128, "T_q": 256}),
        (False, {"D": 40}),
        (False, {"dtype": torch.float32}),
        (False, {"capability": (8, 0)}),
        (False, {"capability": (12, 0)}),
    ],
    ids=str,
)
def test_one_pass_is_for_many_heads_whose_sums_fit_in_l2(one, changes, monkeypatch):
    asked = {"heads": 768, "T_q": 1024, "D": 64, "dtype": torch.bfloat16, **SM_90} | changes
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for name in SM_90:
        value = asked.pop(name)
        monkeypatch.setattr(launch, name, lambda device, value=value: value)
    assert launch.attention_one_pass(**asked, device=torch.device("cuda")) is one
