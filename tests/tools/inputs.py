"""Inputs for kernels and models, seeded by shape: dtypes, values beyond unit normals, layouts beyond contiguous."""

import pytest
import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# torch.compile's backends: aot_eager traces and differentiates as inductor does, and generates no code
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]

VALUES = {
    "normal": lambda x: x,
    "offset": lambda x: x + 100,  # statistics must not cancel
    "tiny": lambda x: 1e-3 + 1e-4 * x,  # variance below eps
    "equal": lambda x: torch.full_like(x, 3.7),  # variance 0
    "one-hot": lambda x: torch.zeros_like(x).index_fill_(-1, torch.tensor([x.shape[-1] // 2]), 50.0),
    "extreme": lambda x: x.clamp(-1, 1) * 6e4,  # next to fp16's 65504
}

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset by one": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),  # not aligned to 16 bytes
}


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, device="cpu", seed: int = 0, values: str = "normal"
) -> Tensor:
    """Return VALUES of standard normals, drawn on the CPU and therefore equal on every device."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (VALUES[values](x) if x.numel() else x).to(device, dtype)


@torch.no_grad()
def randomise(model: nn.Module, std: float, seed: int) -> None:
    """Make all parameters random, LayerNorm's weights around 1: a lost bias would not be noticed if it were zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(0.0, std, generator=generator)
        if "ln_" in name and name.endswith("weight"):
            p += 1


def targets_of(N: int, V: int, device: torch.device, ignored: bool = True, seed: int = 0) -> Tensor:
    """Return targets (N,) that include the first and the last word; every fourth row is ignored."""
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed + N))
    targets[:1], targets[-1:] = 0, V - 1
    if ignored and N > 2:
        targets[1::4] = -100
    return targets.to(device)
