"""Faults planted in kernels/adamw.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "beta1 * (g - m)", "beta1 * g", "the first moment never decays", "test_as_accurate_as_torchs_over_several_steps"
    ),
    Mutant(
        "beta2 * (g * g - v)",
        "beta2 * (g - v)",
        "the gradient is not squared",
        "test_as_accurate_as_torchs_over_several_steps",
    ),
    Mutant(
        "BLOCK, WHOLE) / divisor",
        "BLOCK, WHOLE)",
        "gradients are not clipped",
        "test_as_accurate_as_torchs_over_several_steps",
    ),
    Mutant("w -= decay * w + rate", "w -= rate", "no weight decay", "test_as_accurate_as_torchs_over_several_steps"),
    Mutant(
        "if copy_at != 0:",
        "if copy_at == 1:",
        "copies are not updated",
        "test_as_accurate_as_torchs_over_several_steps",
    ),
    Mutant(
        "tl.minimum(first + CHUNK, tl.load(row_ptr + SIZE))",
        "tl.load(row_ptr + SIZE)",
        "chunks overlap",
        "test_as_accurate_as_torchs_over_several_steps",
    ),
    Mutant(
        "squares += g * g",
        "squares = g * g",
        "a norm of the last block only",
        "test_as_accurate_as_torchs_over_several_steps",
    ),
    Mutant(
        'end = tl.where(divisor < float("inf"), end, first)',
        "end = end",
        "NaN gradients are applied",
        "training/test_step.py::test_weights_moments_and_step_counts_stay_bit_for_bit",
    ),
    Mutant(
        "tl.where(counts, 1.0, 0.0)",
        "1.0",
        "skipped steps are counted",
        "training/test_step.py::test_weights_moments_and_step_counts_stay_bit_for_bit",
    ),
    Mutant(
        "if rows == self._rows:",
        "if self._rows:",
        "addresses of the first step are kept",
        "test_as_accurate_as_torchs_over_several_steps",
    ),
    Mutant(
        "triton.cdiv(size, launch.adamw_chunk().CHUNK)",
        "size // launch.adamw_chunk().CHUNK",
        "the last chunk is missing",
        "test_as_accurate_as_torchs_over_several_steps",
    ),
]
