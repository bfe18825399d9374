"""The one way an op of this folder is registered with torch.

`op` registers a function as the opaque op `gpt2fast::<name>`: torch.compile calls it without looking inside, and
learns shapes, dtypes and strides from `fake`. Autograd stays outside, in a `torch.autograd.Function` that calls the
forward op and the backward op. Measured on torch 2.13 and 2.15: this form works eager, under
torch.compile(fullgraph=True), opcheck and autocast also when Triton is interpreted, where `triton_op` does not (its
body is its own fake, and interpreted kernels touch data); it costs 26 us of host time forward and backward, where
`custom_op` with `register_autograd` costs 41.

Rules for a registered function: it allocates its results and mutates no argument; it returns no input and no view
of one; what backward needs is among its results. `fake` allocates with `new_empty(shape)`, never `empty_like`, which
would copy the strides of an input that the kernel does not copy.
"""

from collections.abc import Callable

import torch

NAMESPACE = "gpt2fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def op(name: str, *, fake: Callable) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorator. The function's annotations give the schema; the result is the op, to be called like the function."""

    def register(fn: Callable) -> torch._ops.OpOverload:
        _library.define(name + torch.library.infer_schema(fn, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, fn, "CompositeExplicitAutograd")  # one body for every device: Triton knows which
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register
