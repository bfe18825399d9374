"""LayerNorm and GELU as ops that Inductor looks into, instead of opaque ones: an experiment for the ladder.

Our ops are opaque to torch.compile: their launches, and the additions that end a backward pass, happen inside a call
that it does not look into. `make_visible` registers the same functions as torch's `triton_op`, so that Inductor
launches the kernels itself, plans their memory and compiles the additions. It cannot fuse into a kernel that is written
by hand.
Predicted: nothing at B=64, where the device is never short of work; some per cent of a small step without CUDA graphs,
26 us of host time an op. Not the default: Triton's interpreter, and so every test without a GPU, needs opaque ops.
"""

import sys
from collections.abc import Iterator

import torch
from torch import library
from triton.runtime.jit import JITFunction

from gpt2fast.kernels import registration

FILES = ("tanh_gelu", "layernorm")
NAMESPACE = "gpt2fast_visible"


class Launched:
    """A kernel that is launched as torch wants it inside a triton_op."""

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        return library.wrap_triton(self.kernel)[grid]


def replacements() -> Iterator[tuple[object, str, object]]:
    """(module, name, what takes its place) of every kernel and op in FILES."""
    for file in FILES:
        module = sys.modules[f"gpt2fast.kernels.{file}"]
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                yield module, name, Launched(value)
            elif isinstance(value, torch._ops.OpOverload):
                body = registration.BODIES[name]
                yield module, name, library.triton_op(f"{NAMESPACE}::{name}", body, mutates_args=())


def make_visible() -> None:
    """For the rest of this process."""
    for module, name, value in replacements():
        setattr(module, name, value)
