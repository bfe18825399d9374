"""Faults planted in kernels/launch.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "6 * rounds * programs <= 7 * heads",
        "programs <= heads",
        "a second round for few heads",
        "test_one_pass_is_for_many_heads_whose_sums_fit_in_l2",
    ),
    Mutant(
        "4 * scratch <= 3 * l2_cache",
        "scratch <= l2_cache",
        "all of L2 for the scratch",
        "test_one_pass_is_for_many_heads_whose_sums_fit_in_l2",
    ),
]
