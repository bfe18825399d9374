"""Faults planted in kernels/tanh_gelu.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant("x * x * CUBIC", "x * x * THREE_CUBIC", "another cubic term", "test_gelu"),
    Mutant("tl.sigmoid(-gelu_z(x))", "(1 - s * s)", "derivative of tanh instead of sigmoid", "test_gelu"),
    Mutant("mask=offs < n)", "mask=offs < n - 1)", "last element not written", "test_gelu"),
    Mutant("db += dx", "db += do", "db without GELU's derivative", "test_gelu_of_other_values"),
    Mutant("for tile in range(part,", "for tile in range(0,", "every program does all tiles", "test_bias_gelu"),
    Mutant("+ b[None, :]\n        dx", "\n        dx", "backward forgets the bias", "test_gelu_of_other_values"),
    Mutant(
        "tl.program_id(0).to(tl.int64) * BLOCK",
        "tl.program_id(0) * BLOCK",
        "int32 offsets of elements",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
    Mutant(
        "(tl.program_id(0) // column_blocks).to(tl.int64)",
        "(tl.program_id(0) // column_blocks)",
        "int32 offsets of tiles",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
    Mutant(
        "+ tl.arange(0, BLOCK_M)).to(tl.int64)",
        "+ tl.arange(0, BLOCK_M))",
        "int32 offsets of rows",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
]
