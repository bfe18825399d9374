"""Faults planted in kernels/attention_backward.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "mask=first > 0, other=0.0",
        "mask=first > -1, other=0.0",
        "the scratch is read before it is written",
        "test_gradients",
    ),
    Mutant("and seen <= first", "and seen < first", "dq stays in the scratch", "test_gradients"),
    Mutant(
        "start + BLOCK_M + T_k - T_q)", "start + BLOCK_M)", "dq is written after another key tile", "test_gradients"
    ),
    Mutant("if first + BLOCK_N >= T_k:", "if first + BLOCK_N == T_k:", "the last keys have no mask", "test_gradients"),
    Mutant(
        "permute(2, 5, 3, 1, 0, 4, 6)",
        "permute(2, 5, 3, 1, 0, 6, 4)",
        "the scratch is read in another order",
        "test_gradients",
    ),
    Mutant(
        "and start + BLOCK_M + T_k - T_q <= 0",
        "and start + BLOCK_M + T_k - T_q < -T_q",
        "dq of queries that see no key is not written",
        "test_gradients",
    ),
    Mutant("(dp - delta[None, :])", "dp", "delta missing", "test_gradients"),
    Mutant("dq * scale", "dq", "scale missing in dq", "test_gradients"),
    Mutant("lse = lse_ptr + tl.cast(bh, tl.int64) * T_q", "lse = lse_ptr", "lse of head 0", "test_gradients"),
]
