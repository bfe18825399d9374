"""pytest-benchmark cases: the seven ops of each backend that can be built here, and a whole step of nano.

    python -m pytest benchmarks --benchmark-enable

Without --benchmark-enable each runs once, untimed, so that it stays able to run.
"""

import pytest
import torch

from benchmarks import ladder
from gpt2fast.errors import UserError
from gpt2fast.machine.device import DTYPES, pick_device, pick_precision, synchronize
from gpt2fast.model import EPS, GPT, SIZES
from gpt2fast.ops import NAMES, Backend, OpsConfig, build, interpreted
from gpt2fast.training import optim
from gpt2fast.training.step import TrainingStep

B, T, C, H, V = 4, 256, 768, 12, 50304
DEVICE = pick_device()
PRECISION = pick_precision("auto", DEVICE)  # bf16 without units for it takes minutes on a CPU
DTYPE = DTYPES[PRECISION]


def inputs(op: str) -> tuple[list[torch.Tensor], list]:
    """Floating-point inputs in gpt2's width, and the other arguments."""
    arguments: dict[str, tuple[list, list]] = {
        "embedding": ([(V, C), (T, C)], [torch.randint(50257, (B, T), device=DEVICE), DTYPE]),
        "layer_norm": ([(B * T, C), (C,), (C,)], [EPS]),
        "add_layer_norm": ([(B * T, C), (B * T, C), (C,), (C,)], [EPS]),
        "attention": ([(B, T, 3 * C)], [H]),
        "mlp": ([(B * T, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)], []),
        "linear": ([(B * T, C), (3 * C, C), (3 * C,)], []),
        "linear_cross_entropy": ([(B * T, C), (V, C)], [torch.randint(50257, (B * T,), device=DEVICE), 50257]),
    }
    shapes, others = arguments[op]
    return [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for shape in shapes], others


def backend(name: Backend):
    if interpreted(OpsConfig().with_backend(name)):
        pytest.skip("the time of Triton's interpreter says nothing")
    try:
        return build(OpsConfig().with_backend(name), DEVICE.type)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("name", ["torch", "triton"])
def bench_op(benchmark, name, op, direction):
    function = getattr(backend(name), op)
    tensors, others = inputs(op)

    def call():
        out = function(*tensors, *others)
        if direction == "both":
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, tensors, [torch.ones_like(o) for o in outs])
        synchronize(DEVICE)

    benchmark(call)


@pytest.mark.parametrize("name", ["torch", "triton"])
def bench_nano_step(benchmark, name):
    model = GPT(SIZES["nano"], backend(name)).to(DEVICE)
    take_step = TrainingStep(model, optim.adamw(model, 0.1), precision=PRECISION)
    batches = ladder.endless_batches(50257, 8, 128, DEVICE)

    def call():
        take_step(batches, ladder.LEARNING_RATE)
        synchronize(DEVICE)

    benchmark(call)
