"""Faults planted in gpt2fast/inference/decode.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "p.cumsum(-1) - p >=",
        "p.cumsum(-1) >=",
        "a nucleus without its last token",
        "test_tokens_are_chosen_with_their_probabilities",
    ),
    Mutant(
        "self.length += grown",
        "self.length += 1",
        "a row that has ended grows",
        "test_when_all_rows_have_ended_decoding_stops",
    ),
    Mutant(
        "if longest > block_size:",
        "if longest >= block_size:",
        "the last position is not used",
        "test_within_the_block_no_token_is_computed_twice",
    ),
]
