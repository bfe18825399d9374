"""The one way to register an op of this folder with torch, and the checks that public functions share.

`op` registers a function as the opaque op `gpt2fast::<name>`: torch.compile calls it without looking inside, and
takes shapes, dtypes and strides from `fake`. Autograd stays outside, in a `torch.autograd.Function` that calls the
forward op and the backward op. Measured with torch 2.13 and 2.15: this form works in eager mode, under
torch.compile(fullgraph=True), opcheck and autocast even if Triton is interpreted, where `triton_op` does not (its body
is its own fake, and interpreted kernels touch data); forward and backward cost 0.6 of the host time that they cost with
`custom_op` and `register_autograd`.

Rules for a registered function: it allocates its results and mutates only arguments that it names in `mutates`; it
returns no input and no view of one; what backward needs is among its results. `fake` allocates with `new_empty(shape)`,
never `empty_like`, which would copy the strides of an input that the kernel does not copy. Backward methods are
`once_differentiable`: torch refuses a second derivative, which would otherwise be zero without a word.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from gpt2fast.kernels.launch import INTERPRETED

NAMESPACE = "gpt2fast"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_library = library.Library(NAMESPACE, "FRAGMENT")


def op(name: str, *, fake: Callable, mutates: Sequence[str] = ()) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorate a function: its annotations give the schema; the result is the op, called like the function."""

    def register(fn: Callable) -> torch._ops.OpOverload:
        schema = library.infer_schema(fn, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # one body for every device, since Triton compiles for the current one
        _library.impl(name, _interpreted(fn) if INTERPRETED else _on_its_device(fn), "CompositeExplicitAutograd")
        library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def _on_its_device(fn: Callable) -> Callable:
    """Make the tensors' device the current one during the call, since Triton launches on that."""

    @functools.wraps(fn)
    def call(*args):
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        module = torch.get_device_module(device)
        if device.index in (None, module.current_device()):
            return fn(*args)
        with module.device(device):
            return fn(*args)

    return call


def _interpreted(fn: Callable) -> Callable:
    """Raise on bf16 instead of returning garbage if Triton's interpreter takes its bits for integers."""

    @functools.wraps(fn)
    def call(*args):
        half = any(isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 for arg in args) or torch.bfloat16 in args
        if half and not _interpreter_knows_bf16():
            raise TypeError(
                "Triton's interpreter (TRITON_INTERPRET=1) computes bfloat16 wrongly: use float32 (--precision fp32)"
            )
        return fn(*args)

    return call


@triton.jit
def _square_kernel(x_ptr, o_ptr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    tl.store(o_ptr + tl.arange(0, 16), x * x)


@triton.jit
def _loop_kernel(n_ptr, o_ptr):
    for i in range(tl.load(n_ptr)):
        tl.store(o_ptr, i)


def interpreter_fault() -> str | None:
    """Return why Triton's interpreter, if it is on, cannot run these kernels at all; None if it can."""
    n = torch.ones((), dtype=torch.int32)
    try:
        if INTERPRETED:
            _loop_kernel[(1,)](n, torch.zeros_like(n))
    except Exception:
        return (
            f"the interpreter of Triton {triton.__version__} fails with the numpy that is installed: "
            "pip install 'numpy<2.4', or use --backend torch"
        )
    return None


def _interpreter_knows_bf16() -> bool:
    """Return whether bf16 works. Tried until it does: the tests repair the interpreter, and Triton may one day."""
    global _bf16_is_right
    if not _bf16_is_right:
        x = torch.full((16,), 1.5, dtype=torch.bfloat16)
        o = torch.zeros_like(x)
        _square_kernel[(1,)](x, o)
        _bf16_is_right = bool((o == 2.25).all())
    return _bf16_is_right


_bf16_is_right = False


def compute_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """Return autocast's dtype if it is on, else `dtype` or that of x. Autocast itself does not reach custom ops."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype or x.dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype if autocast is on; else change nothing, so that mixed dtypes are still refused."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def check_tensors(op: str, same_dtype: bool = False, **tensors: Tensor) -> None:
    """Raise ValueError unless all are on one device that Triton runs on, and TypeError unless their dtypes are those of
    the kernels and, with `same_dtype`, that of the first one."""
    (first, x), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {tensor.dtype}: it must be float32, bfloat16 or float16")
    for name, tensor in others:
        check_device(op, first, x, name, tensor)
        if same_dtype and tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {first} is {x.dtype} and {name} is {tensor.dtype}: convert one of them")
    if x.device.type in ("cpu", "mps") and not INTERPRETED:
        raise ValueError(
            f"{op}: {first} is on {x.device}, for which Triton has no compiler: move it to a GPU, use "
            "gpt2fast.reference, or set TRITON_INTERPRET=1 before Python starts"
        )


def check_device(op: str, first: str, x: Tensor, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if tensor.device != x.device:
        raise ValueError(f"{op}: {first} is on {x.device} and {name} on {tensor.device}: move one of them")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has that shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}: it must be {tuple(shape)}")


def dot_precision() -> str:
    """Return the precision of fp32 dots: exact unless the user has allowed TF32 in torch, by the older or the newer
    setting (after the newer one was used, the older one's getter raises)."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
