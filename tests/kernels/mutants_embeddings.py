"""Faults planted in kernels/embeddings.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        'other=float("nan")',
        "other=0.0",
        "an unknown token does not give NaN",
        "test_a_token_outside_the_vocabulary_gives_nan_and_is_never_an_address",
    ),
    Mutant("(offs_m % T)", "(offs_m // T)", "the embedding of another position", "test_embedding"),
    Mutant("dwpe += tl.load", "dwpe = tl.load", "dwpe of the last sequences only", "test_embedding"),
    Mutant(
        "before == LONG)",
        "before == LONG + 1)",
        "a token just long enough is lost",
        "test_the_gradient_of_a_word_is_the_sum_rounded_once",
    ),
    Mutant("if n <= MOST:", "if n < MOST:", "a token of the longest short kind is lost", "test_embedding"),
    Mutant("total += _sum_fixed", "total = _sum_fixed", "the last positions only", "test_embedding"),
    Mutant("62 + 126 - BITS", "22 + 126 - BITS", "too few bits", "test_embedding"),
    Mutant(
        "tl.where(largest < INF, dwte, not_finite)",
        "dwte",
        "infinity and NaN are forgotten",
        "test_infinity_and_nan_stay_in_their_word_and_column",
    ),
]
