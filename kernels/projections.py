"""The MLP and the projections, composed of torch's matmuls and the kernels of this folder.

    mlp(x) = bias_gelu(x fc_w^T, fc_b) proj_w^T + proj_b

Traffic   The first bias is added by the GELU kernel, not by the matmul: its gradient is then summed in the pass that
          computes dx, where torch reads the (B T, 4C) gradient once more (0.4 GB a layer at B=64, T=1024, C=768).
"""

import torch.nn.functional as F
from torch import Tensor

from gpt2fast.kernels.tanh_gelu import bias_gelu


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Return x w^T + b: (..., I), (O, I), (O,) -> (..., O)."""
    return F.linear(x, w, b)


def mlp(x: Tensor, fc_w: Tensor, fc_b: Tensor, proj_w: Tensor, proj_b: Tensor) -> Tensor:
    """Return gelu(x fc_w^T + fc_b) proj_w^T + proj_b: (..., C), (F, C), (F,), (C, F), (C,) -> (..., C)."""
    return F.linear(bias_gelu(F.linear(x, fc_w), fc_b), proj_w, proj_b)
