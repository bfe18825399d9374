"""A correction of bf16 in Triton's interpreter, for tests only.

The interpreter (3.6 to 3.9) stores bf16 as uint16 and silently computes with those bits as integers; its cast to bf16
truncates. Here, every operation on bf16 goes through fp32: operands are widened exactly, and the result is rounded once
to nearest even, as on a GPU; reductions and scans widen once and round once. Triton 3.6 also lacks bf16 constants
(`x * 1.5`) and, with numpy 2.4, loops over range(lo, hi) of tensors; `repair` adds both. Casts to and from fp8, and
those with an explicit rounding mode, are still Triton's.

Private names are patched; each is asserted to exist, so a Triton that renames one fails here and not in a kernel.
`only_program` runs one program of a grid, so that offsets beyond 2^31 cost no more than small ones.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

Builder, TensorHandle = triton_interpreter.InterpreterBuilder, triton_interpreter.TensorHandle
HALF_TYPES = {tl.bfloat16, tl.float16}
COMPUTING = ("binary_op", "ternary_op", "unary_op", "create_dot", "create_fma", "create_fabs", "create_rsqrt")
PRIVATE = {
    "InterpreterBuilder": (*COMPUTING, "cast_impl", "create_fp_to_fp", "get_fp32", "set_grid_idx"),
    "ReduceScanOpInterface": ("apply",),
    "interpreter_builder": (),
    "_patch_lang_tensor": (),
}


def is_bf16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype == tl.bfloat16


def to_fp32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def to_bf16(handle: TensorHandle) -> TensorHandle:
    """Round fp32 to bf16, to nearest, ties to even. Overflow becomes infinity; NaN must not, so it is handled apart."""
    x = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(handle.data.shape), tl.bfloat16)


def through_fp32(method: Callable) -> Callable:
    """Return a builder's method that widens bf16 operands and rounds a result that must be bf16."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        if not any(is_bf16(arg) for arg in args):
            return method(self, *args, **kwargs)
        result = method(self, *(to_fp32(arg) if is_bf16(arg) else arg for arg in args), **kwargs)
        wide = method.__name__ == "create_dot" and not is_bf16(args[2])  # the accumulator has the dtype of the result
        return result if wide or result.data.dtype != np.float32 else to_bf16(result)

    return call


def cast(method: Callable) -> Callable:
    """Return the builder's cast, corrected for bf16 on either side; fp32 -> fp16 is numpy's and was correct."""

    @functools.wraps(method)
    def call(self, src, dst_type):
        if is_bf16(src):
            src = to_fp32(src)
        if dst_type.scalar != tl.bfloat16:
            return method(self, src, dst_type)
        return to_bf16(method(self, src, tl.float32))

    return call


def cast_of_half_types(method: Callable) -> Callable:
    """Return create_fp_to_fp, which in Triton 3.9 casts fp16 <-> bf16 too; fp8 and rounding modes are left to it."""

    @functools.wraps(method)
    def call(self, src, dst_type, rounding_mode):
        if {src.dtype.scalar, dst_type.scalar} == HALF_TYPES:
            return self.cast_impl(src, dst_type)
        return method(self, src, dst_type, rounding_mode)

    return call


def reduce_in_fp32(method: Callable) -> Callable:
    """Return the method for reductions and scans, which pass arrays to numpy and bypass the builder."""

    def retyped(x: tl.tensor, convert: Callable) -> tl.tensor:
        handle = convert(x.handle)
        return tl.tensor(handle, x.type.with_element_ty(handle.dtype) if x.type.is_block() else handle.dtype)

    @functools.wraps(method)
    def apply(self, input):
        if not isinstance(input, tuple):
            return method(self, input)  # which calls this again with a tuple
        half = [is_bf16(x.handle) for x in input]
        result = method(self, tuple(retyped(x, to_fp32) if h else x for x, h in zip(input, half)))
        return tuple(retyped(x, to_bf16) if h else x for x, h in zip(result, half))

    return apply


def repair() -> None:
    """Patch the interpreter, once; do nothing where kernels are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    missing = [name for name in PRIVATE if not hasattr(triton_interpreter, name)]
    for owner in PRIVATE.keys() - missing:
        missing += [name for name in PRIVATE[owner] if not hasattr(getattr(triton_interpreter, owner), name)]
    assert not missing, f"this Triton's interpreter has no {missing}: tests/tools/interpreter.py must be adapted"
    if getattr(Builder, "repaired", False):
        return
    Builder.repaired = True
    for name in COMPUTING:
        setattr(Builder, name, through_fp32(getattr(Builder, name)))
    Builder.cast_impl = cast(Builder.cast_impl)
    Builder.create_fp_to_fp = cast_of_half_types(Builder.create_fp_to_fp)
    Builder.get_bf16 = lambda self, value: to_bf16(self.get_fp32(value))
    reduce_scan = triton_interpreter.ReduceScanOpInterface
    reduce_scan.apply = reduce_in_fp32(reduce_scan.apply)
    patch_tensor = triton_interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    triton_interpreter._patch_lang_tensor = patch_tensor_and_index


@contextlib.contextmanager
def only_program(pid: int) -> Iterator[None]:
    """Run a kernel that is launched on a grid of (1,) as program `pid`, within the context."""
    builder = triton_interpreter.interpreter_builder
    builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (pid, 0, 0))
    try:
        yield
    finally:
        del builder.set_grid_idx
