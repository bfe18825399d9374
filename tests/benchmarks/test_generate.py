"""Writing text, by others and by us."""

from benchmarks import generate


def test_the_share_of_tokens_that_are_the_same():
    first = {"text": [1, 2, 3, 4]}
    assert generate.agreement({"text": [1, 2, 9, 4]}, [first]) == 0.75
    assert generate.agreement(first, []) is None
