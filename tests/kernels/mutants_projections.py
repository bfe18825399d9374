"""Faults planted in kernels/projections.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant("F.linear(x, fc_w)", "F.linear(x, fc_w, fc_b)", "bias added twice", "test_as_accurate_as_torch"),
]
