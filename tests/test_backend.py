"""GPT-2 on the triton backend trains as on the torch backend: op by op, and all at once."""

from dataclasses import asdict

import pytest
import torch
from accuracy import assert_as_accurate

from gpt2fast import optim
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import NAMES, OpsConfig, build
from gpt2fast.step import TrainingStep

pytestmark = pytest.mark.kernel


CONFIG = GPTConfig(
    n_layer=2, n_head=2, n_embd=64, block_size=40, vocab_size=300
)  # 124M's shape, small; 20 words of padding
STEPS = 10
SWAPS = {name: OpsConfig(**{name: "triton"}) for name in NAMES} | {"all": OpsConfig().with_backend("triton")}
runs: dict[tuple, torch.Tensor] = {}


def losses(config: OpsConfig, precision: str, device: torch.device) -> torch.Tensor:
    """Of STEPS steps of AdamW from the same weights on the same tokens: in float64, fp32 or under bf16 autocast."""
    key = (tuple(asdict(config.with_backend("torch")).values()), precision)
    if key not in runs:
        model = GPT(CONFIG, build(config, device.type)).to(device)
        if precision == "fp64":
            model = model.double()
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(CONFIG.vocab_size, (2, 41), generator=generator).to(device)  # the same every time
        take_step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32" if precision == "fp64" else precision)
        batches = iter([(tokens[:, :-1], tokens[:, 1:])] * STEPS)
        runs[key] = torch.stack([take_step(batches, 3e-3)[0].detach().cpu() for _ in range(STEPS)])
    return runs[key]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("swap", SWAPS)
def test_the_same_losses(swap, precision, device):
    truth, base = losses(OpsConfig(), "fp64", device).double(), losses(OpsConfig(), precision, device)
    got = losses(SWAPS[swap], precision, device)
    assert truth[-1] < truth[0] - 1.0
    assert_as_accurate(got, truth, base, name=f"losses with {swap} swapped")
