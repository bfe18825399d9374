"""A check for what torch itself cannot do on a CPU with limited instructions."""

import pytest
import torch
import torch.nn.functional as F


def attends(dtype: torch.dtype) -> None:
    """Skip the test if torch's own attention fails in `dtype`.

    With ATEN_CPU_CAPABILITY below avx512 on a CPU with AMX, oneDNN requires packed bf16 and ATen cannot pack it.
    """
    x = torch.zeros(2, 4, 256, 64, dtype=dtype)
    try:
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError as error:
        if "pack_vnni2 is only supported" not in str(error):
            raise
        pytest.skip(f"torch's attention in {dtype}: {str(error).splitlines()[0]}")
