"""Faults planted in gpt2fast/inference/cache.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(":T] = k, v", ":T] = v, k", "keys and values are swapped", "test_cached_logits_are_the_uncached_ones"),
]
