"""Faults planted in kernels/attention_decode.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "acc * alpha[:, None] + w", "acc + w", "a lane's sum is not rescaled", "test_as_accurate_as_honest_arithmetic"
    ),
    Mutant(
        "mask_n = offs_n < position",
        "mask_n = offs_n <= position",
        "the new token counts twice",
        "test_as_accurate_as_honest_arithmetic",
    ),
    Mutant(
        "tl.program_id(0).to(tl.int64)",
        "tl.program_id(0)",
        "int32 offsets",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
]
