"""The FLOPs of a token, compared with the literature and with torch's counter; peaks of known devices."""

import pytest
import torch

from gpt2fast.model import GPT, SIZES, GPTConfig
from gpt2fast.training import flops


def test_flops_agree_with_the_literature():
    gpt2 = SIZES["gpt2"]
    assert flops.parameters(gpt2) == 124_439_808
    assert flops.flops_per_token(gpt2, 1024) / 1e6 == pytest.approx(859.9, abs=0.05)
    assert flops.mfu(700_000, gpt2, 1024, flops.peak_flops("NVIDIA H200", "bf16")) == pytest.approx(0.608, abs=0.001)


def test_flops_agree_with_torchs_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from gpt2fast import reference
    from gpt2fast.ops import Ops

    c = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=1024)
    # reference's ops, since the counter cannot look into the operators of cpu.py
    ops = Ops(**{name: getattr(reference, name) for name in Ops.__dataclass_fields__})
    model, idx = GPT(c, ops), torch.zeros(1, 128, dtype=torch.long)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # an older torch does not count flash attention on a CPU
        model(idx, idx).backward()
    # positions, biases and LayerNorm are not matmuls, although 6 N includes them
    counted = counter.get_total_flops() / 128
    matmul = 6 * (2 * 12 * 64 * 64 + 1024 * 64)
    attention = 12 * 2 * 64 * 128
    assert counted == matmul + attention


def test_an_unknown_device_has_no_mfu():
    for name, precision in (
        ("NVIDIA H200 NVL", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("Intel", "fp32"),
    ):
        assert flops.mfu(1e6, SIZES["gpt2"], 1024, flops.peak_flops(name, precision)) is None
    assert flops.peak_flops("NVIDIA H200", "fp32", tf32=True) > flops.peak_flops("NVIDIA H200", "fp32")


def test_flops_per_token_of_gpt2():
    assert flops.flops_per_token(SIZES["gpt2"], 1024) == pytest.approx(859.9e6, abs=0.05e6)
