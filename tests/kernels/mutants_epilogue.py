"""Faults planted in kernels/epilogue.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "t = tl.where(z >= 0, small, large)",
        "t = tl.where(z >= 0, large, small)",
        "sigmoid(z) for sigmoid(-z)",
        "test_as_accurate_as_torch",
    ),
    Mutant("e = tl.exp(-tl.abs(z))", "e = tl.exp(-z)", "overflow in the left tail", "test_as_accurate_as_torch"),
    Mutant(
        "_gelu_and_grad(h.to(tl.float32))",
        "_gelu_and_grad(acc + b.to(tl.float32)[None, :])",
        "GELU of the unrounded h, unlike backward's",
        "test_backward_recomputes_the_same_bits",
    ),
    Mutant(
        "dh = da * grad",
        "dh = da.to(h_ptr.dtype.element_ty).to(tl.float32) * grad",
        "the product is rounded before its derivative",
        "test_the_bias_gradient_is_summed_before_it_is_rounded",
    ),
    Mutant("tl.sum(dh, axis=0)", "tl.sum(da, axis=0)", "db without GELU's derivative", "test_as_accurate_as_torch"),
    Mutant(
        "db_ptr + (row // BLOCK_M).to(tl.int64) * N", "db_ptr", "db of the last rows only", "test_as_accurate_as_torch"
    ),
    Mutant(
        "row, col + i * PIECE, M, N",
        "row, col, M, N",
        "all pieces in the first one's place, forward",
        "test_as_accurate_as_torch",
    ),
    Mutant(
        "row, col + i * PIECE, M, N",
        "row, col, M, N",
        "all pieces in the first one's place, backward",
        "test_as_accurate_as_torch",
        nth=1,
    ),
    Mutant('(shared["PROGRAMS"],)', "(1,)", "only some tiles are computed", "test_as_accurate_as_torch", nth=1),
]
