"""Writing text, by others and by us."""

import pytest

from benchmarks import generate
from gpt2fast.errors import UserError


def test_the_share_of_tokens_that_are_the_same():
    first = {"text": [1, 2, 3, 4]}
    assert generate.agreement({"text": [1, 2, 9, 4]}, [first]) == 0.75
    assert generate.agreement(first, []) is None


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(UserError, match="--prompt 100 and --tokens 100 are more than 128 positions: lower one"):
        generate.compare(generate.GenerateConfig(size="nano", prompt=100, tokens=100))
