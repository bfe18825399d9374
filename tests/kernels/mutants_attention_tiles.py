"""Faults planted in kernels/attention_tiles.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "end = tl.minimum(tl.maximum(first + BLOCK_M + T_k - T_q, 0), T_k)",
        "end = T_k",
        "fully masked tiles of keys are visited",
        "kernels/test_attention_forward.py::test_fully_masked_tiles_are_not_visited",
    ),
    Mutant(
        "lo = tl.maximum(first - (T_k - T_q), 0) // BLOCK_M * BLOCK_M",
        "lo = 0",
        "fully masked tiles of queries are visited",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "offs_n <= offs_m",
        "offs_n < offs_m",
        "causal mask off by one",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "offs_m + (T_k - T_q)",
        "offs_m",
        "causal diagonal at the start",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "first + T_k - T_q + 1, 0",
        "first + T_k - T_q + BLOCK_N, 0",
        "masked tiles taken for full",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "visible = offs_n < T_k",
        "visible = offs_n < T_k + 1",
        "one key too many",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        'base = tl.where(m_new == float("-inf"), 0.0, m_new)',
        "base = m_new",
        "NaN before the first visible key",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "acc * alpha[:, None]",
        "acc",
        "accumulator not rescaled",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "l = l * alpha + tl.sum(p, axis=1)",
        "l = l + tl.sum(p, axis=1)",
        "sum not rescaled",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "p.to(v.dtype), v",
        "p.to(tl.bfloat16).to(v.dtype), v",
        "p rounded more than its dtype",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant("dk * scale", "dk", "scale missing in dk", "kernels/test_attention_forward.py::test_flash_attention"),
    Mutant("dq * scale", "dq", "scale missing in dq", "kernels/test_attention_forward.py::test_flash_attention"),
    Mutant(
        "ds = p * (dp - delta[:, None])",
        "ds = p * dp",
        "delta missing in dq",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "ds = p * (dp - delta[None, :])",
        "ds = p * dp",
        "delta missing in dk",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "// BLOCK_M * BLOCK_M\n        full",
        "// BLOCK_M * BLOCK_M + BLOCK_M\n        full",
        "backward skips the first tile of queries",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "first + BLOCK_N - 1 - (T_k - T_q), 0",
        "first - (T_k - T_q), 0",
        "diagonal of dk, dv taken for full",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "l == 0, 1.0, l",
        "l == 0, 0.0, l",
        "division by zero",
        "kernels/test_attention_forward.py::test_flash_attention",
    ),
    Mutant(
        "offs_t.to(tl.int64)[:, None] * stride_t",
        "offs_t[:, None] * stride_t",
        "int32 offsets of positions",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
    Mutant(
        "(bh // H).to(tl.int64), (bh % H).to(tl.int64)",
        "bh // H, bh % H",
        "int32 offsets of heads",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
]
