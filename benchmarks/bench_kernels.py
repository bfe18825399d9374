"""Time single kernels by hand, beside torch: `python -m pytest benchmarks --benchmark-only`.

The shapes are of GPT-2's width or, on a CPU, nano's, where only torch is timed. `python -m benchmarks.kernels` verifies
results, flushes L2, and knows the device's ceilings; this compares two commits on one machine: --benchmark-autosave,
then --benchmark-compare.
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
        pytest.skip("times of Triton's interpreter mean nothing")
    case = CASES[op]
    fn, inputs = kernels.providers(case, DEVICE)[provider], case.inputs(DEVICE)

    def call():
        kernels.once(fn, inputs, case.others, backward=direction == "both")
        synchronize(DEVICE)

    benchmark(call)
