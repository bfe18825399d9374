"""Faults planted in kernels/layernorm.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "mean + rest, mask", "(mean + rest).to(tl.bfloat16).to(tl.float32), mask", "bf16 mean saved", "test_layer_norm"
    ),
    Mutant(
        "rstd, mask=mask_m)", "rstd.to(tl.bfloat16).to(tl.float32), mask=mask_m)", "bf16 rstd saved", "test_layer_norm"
    ),
    Mutant(
        "tl.where(mask, x - mean[:, None], 0.0)",
        "x - mean[:, None]",
        "padding counts in the variance",
        "test_layer_norm",
    ),
    Mutant(
        "rest = tl.sum(x, axis=1) / N",
        "rest = tl.sum(x, axis=1) * 0",
        "the mean's rounding error stays",
        "test_other_values",
    ),
    Mutant(" - z * mean_gz[:, None]", "", "dx without its second projection", "test_layer_norm"),
    Mutant("dw += do * z", "dw += g * z", "dw multiplied by w", "test_layer_norm"),
    Mutant("dx += tl.load(ds_ptr", "dx -= tl.load(ds_ptr", "residual's gradient subtracted", "test_add_layer_norm"),
    Mutant("x = s.to(tl.float32)", "x = x", "the sum is not rounded before it is normalised", "test_add_layer_norm"),
    Mutant(
        "tl.store(dy_ptr + offs, dx, mask=mask)",
        "tl.store(dy_ptr + offs, dx, mask=mask & (offs > 0))",
        "dy not fully written",
        "test_a_residual_stream_of_another_dtype",
    ),
    Mutant(
        "offs_m = tl.program_id(0).to(tl.int64)",
        "offs_m = tl.program_id(0)",
        "int32 offsets of rows, forward",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
    Mutant(
        "+ tl.arange(0, BLOCK_M)).to(tl.int64)",
        "+ tl.arange(0, BLOCK_M))",
        "int32 offsets of rows, backward",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
]
