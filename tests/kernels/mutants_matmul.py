"""Faults planted in kernels/matmul.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "tile % group // rows",
        "tile % group // GROUP_M",
        "some columns are left out",
        "kernels/test_epilogue.py::test_as_accurate_as_torch",
    ),
    Mutant(
        "x.data_ptr() % TMA_BYTES == 0 and ",
        "",
        "TMA from addresses that it cannot reach",
        "kernels/test_epilogue.py::test_layouts",
    ),
    Mutant(
        "& (offs_c < cols)[None, :], other",
        "& (offs_c < cols + 1)[None, :], other",
        "a row is read beyond its end",
        "kernels/test_epilogue.py::test_as_accurate_as_torch",
    ),
    Mutant(
        "offs_r.to(tl.int64)",
        "offs_r",
        "int32 offsets of loads",
        "kernels/test_epilogue.py::test_beyond_2_31_elements",
    ),
    Mutant(
        "offs_r.to(tl.int64)",
        "offs_r",
        "int32 offsets of stores",
        "kernels/test_epilogue.py::test_beyond_2_31_elements",
        nth=1,
    ),
]
