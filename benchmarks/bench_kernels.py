"""pytest-benchmark cases: each single kernel and what torch has in its place, at GPT-2's width or, on a CPU, nano's.

    python -m pytest benchmarks/bench_kernels.py --benchmark-enable

`python -m benchmarks.kernels` verifies, flushes L2, and knows the ceilings; this compares two commits on one machine.
"""

import pytest

from benchmarks import kernels
from gpt2fast.machine.device import pick_device, synchronize

DEVICE = pick_device()
CUDA = DEVICE.type == "cuda"
SIZE, TOKENS, LENGTH = ("gpt2", 8192, 1024) if CUDA else ("nano", 256, 128)
CASES = {case.op: case for case in kernels.cases([SIZE], TOKENS, [LENGTH], DEVICE)}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("provider", ["eager", "triton"])
def bench_kernel(benchmark, provider, op, direction):
    if provider == "triton" and not CUDA:
        pytest.skip("the time of Triton's interpreter says nothing")
    case = CASES[op]
    fn, inputs = kernels.providers(case, DEVICE)[provider], case.inputs(DEVICE)

    def call():
        kernels.once(fn, inputs, case.others, backward=direction == "both")
        synchronize(DEVICE)

    benchmark(call)
