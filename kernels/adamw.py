"""AdamW for all parameters in one launch, after a tiny one that counts the step; the norm of all gradients in another.

    g = dw / divisor,                         divisor = max(1, |all dw| / longest), on the device: the host never waits
    m += (1 - beta1) (g - m),                 v += (1 - beta2) (g^2 - v)
    w -= lr decay w + lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps),      copy = w rounded, if there is one

Shapes    dw, m, v, w, copy of one parameter: the same, any, contiguous. m, v, w: fp32; dw: fp32, bf16 or fp16; copy:
          bf16 or fp16.
Traffic   norm: read dw. Update: 28 bytes per element of a matrix of the blocks (dw bf16, m, v, w in; m, v, w, copy
          bf16 out), 28 of the others (dw fp32, no copy). For GPT-2 124M, where 84.9M of 124.5M parameters have copies:
              norm 0.33 GB + update 3.49 GB = 3.81 GB.
          PyTorch: the blocks' gradients converted to fp32 (2 + 4), norm 4, fused AdamW 28, weights rounded (4 + 2):
              0.51 + 0.50 + 3.49 + 0.51 = 5.00 GB, 1.3 times as much, and 1 GB for each further micro-batch.
Skipping  A step whose `divisor` is not finite (because |all dw| is not) is skipped: nothing is written, no step is
          counted, and the host need not know. So t is kept on the device, and what depends on it is computed there.
Table     One row of numbers per tensor: the addresses, dtypes, length. Kernels read it from memory, so a launch takes
          any number of tensors; each program takes a chunk, that is, a row and a place in its tensor. Addresses are
          compared at each step, on the host, and sent again if they have changed.
Numerics  fp32 inside, whatever the gradient's dtype. What depends on t is computed in float64. The decay
          is subtracted, not multiplied by 1 - lr decay, of which fp32 would keep 4 digits. Squares are summed in fp32,
          in an order that depends only on the sizes: the same bits every time.
Source    Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels import launch
from gpt2fast.kernels.registration import DTYPES, check_shape, check_tensors

# columns of the table: addresses (0: none), dtypes as indices into DTYPES, elements, and whether every address is a
# multiple of 16
G, M, V, W, COPY, STEP, G_DTYPE, COPY_DTYPE, SIZE, ALIGNED, COLUMNS = map(tl.constexpr, range(11))
# columns of the numbers, float64: 1 - beta1, 1 - beta2, eps, lr decay, lr, log2 beta1, log2 beta2 from the host, and
# from the device lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
BETA1, BETA2, EPS, DECAY, LR, LOG2_BETA1, LOG2_BETA2, RATE, CORRECTION, NUMBERS = map(tl.constexpr, range(10))
COUNTED = 128  # tensors whose steps a program counts
FP32, BF16 = tl.constexpr(DTYPES.index(torch.float32)), tl.constexpr(DTYPES.index(torch.bfloat16))


@triton.jit
def _pointers(address, dtype: tl.constexpr, start, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Return BLOCK pointers. WHOLE promises the alignment that the compiler would see in a kernel's argument, so that
    16 bytes are loaded at a time."""
    pointer = address.to(tl.pointer_type(dtype)) + start
    return (tl.multiple_of(pointer, 16) if WHOLE else pointer) + tl.arange(0, BLOCK)


@triton.jit
def _gradient(address, dtype, start, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    mask = (tl.arange(0, BLOCK) < (end - start).to(tl.int32)) | WHOLE
    if dtype == FP32:
        g = tl.load(_pointers(address, tl.float32, start, BLOCK, WHOLE), mask=mask, other=0.0)
    elif dtype == BF16:
        g = tl.load(_pointers(address, tl.bfloat16, start, BLOCK, WHOLE), mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(_pointers(address, tl.float16, start, BLOCK, WHOLE), mask=mask, other=0.0).to(tl.float32)
    return g


@triton.jit
def _update(
    g_at, m_at, v_at, w_at, copy_at, g_dtype, copy_dtype, divisor, beta1, beta2, eps, decay, rate, correction,
    start, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Update elements start .. end - 1, given addresses, dtypes, numbers; `beta1`, `beta2` are 1 - beta1, 1 - beta2."""
    mask = (tl.arange(0, BLOCK) < (end - start).to(tl.int32)) | WHOLE
    m_ptrs = _pointers(m_at, tl.float32, start, BLOCK, WHOLE)
    v_ptrs = _pointers(v_at, tl.float32, start, BLOCK, WHOLE)
    w_ptrs = _pointers(w_at, tl.float32, start, BLOCK, WHOLE)
    m = tl.load(m_ptrs, mask=mask, other=0.0)
    v = tl.load(v_ptrs, mask=mask, other=0.0)
    w = tl.load(w_ptrs, mask=mask, other=0.0)
    g = _gradient(g_at, g_dtype, start, end, BLOCK, WHOLE) / divisor
    m += beta1 * (g - m)
    v += beta2 * (g * g - v)
    w -= decay * w + rate * m / (tl.sqrt(v) * correction + eps)
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)
    tl.store(w_ptrs, w, mask=mask)
    if copy_at != 0:
        if copy_dtype == BF16:
            tl.store(_pointers(copy_at, tl.bfloat16, start, BLOCK, WHOLE), w.to(tl.bfloat16), mask=mask)
        else:
            tl.store(_pointers(copy_at, tl.float16, start, BLOCK, WHOLE), w.to(tl.float16), mask=mask)


@triton.jit
def _chunk(chunks_ptr, table_ptr, CHUNK: tl.constexpr):
    """Return this program's tensor, its row, its first element, its end, and whether all addresses are aligned."""
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    row_ptr = table_ptr + tensor * COLUMNS
    end = tl.minimum(first + CHUNK, tl.load(row_ptr + SIZE))
    return tensor, row_ptr, first, end, tl.load(row_ptr + ALIGNED) != 0


@triton.jit
def _adamw_count_kernel(table_ptr, numbers_ptr, divisor_ptr, n, BLOCK: tl.constexpr):
    """Count a step of each of `n` tensors, unless it is skipped, and compute the numbers that depend on it."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < n
    step_ptrs = tl.load(table_ptr + row * COLUMNS + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    counts = tl.load(divisor_ptr) < float("inf")
    t = tl.load(step_ptrs, mask=mask, other=0.0) + tl.where(counts, 1.0, 0.0)
    tl.store(step_ptrs, t, mask=mask)
    numbers_ptrs = numbers_ptr + row * NUMBERS
    log2_beta1 = tl.load(numbers_ptrs + LOG2_BETA1, mask=mask, other=-1.0)
    log2_beta2 = tl.load(numbers_ptrs + LOG2_BETA2, mask=mask, other=-1.0)
    lr, t = tl.load(numbers_ptrs + LR, mask=mask, other=0.0), t.to(tl.float64)
    mask = row < tl.where(counts, n, 0)  # at step 0 they would be infinite
    tl.store(numbers_ptrs + RATE, lr / (1 - tl.exp2(t * log2_beta1)), mask=mask)
    tl.store(numbers_ptrs + CORRECTION, 1 / tl.sqrt(1 - tl.exp2(t * log2_beta2)), mask=mask)


@triton.jit
def _number(numbers_ptr, column):
    return tl.load(numbers_ptr + column).to(tl.float32)


@triton.jit
def _adamw_kernel(table_ptr, chunks_ptr, numbers_ptr, divisor_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    tensor, row_ptr, first, end, aligned = _chunk(chunks_ptr, table_ptr, CHUNK)
    g_at, m_at, v_at = tl.load(row_ptr + G), tl.load(row_ptr + M), tl.load(row_ptr + V)
    w_at, copy_at = tl.load(row_ptr + W), tl.load(row_ptr + COPY)
    g_dtype, copy_dtype = tl.load(row_ptr + G_DTYPE), tl.load(row_ptr + COPY_DTYPE)
    numbers_ptr += tensor * NUMBERS
    beta1, beta2 = _number(numbers_ptr, BETA1), _number(numbers_ptr, BETA2)
    eps, decay = _number(numbers_ptr, EPS), _number(numbers_ptr, DECAY)
    rate, correction = _number(numbers_ptr, RATE), _number(numbers_ptr, CORRECTION)
    divisor = tl.load(divisor_ptr)
    end = tl.where(divisor < float("inf"), end, first)  # inf or NaN: the step is skipped
    for start in range(first, end, BLOCK):
        if aligned & (start + BLOCK <= end):
            _update(
                g_at, m_at, v_at, w_at, copy_at, g_dtype, copy_dtype, divisor, beta1, beta2, eps, decay, rate,
                correction, start, end, BLOCK, True,
            )  # fmt: skip
        else:
            _update(
                g_at, m_at, v_at, w_at, copy_at, g_dtype, copy_dtype, divisor, beta1, beta2, eps, decay, rate,
                correction, start, end, BLOCK, False,
            )  # fmt: skip


@triton.jit
def _adamw_norm_kernel(table_ptr, chunks_ptr, parts_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    _, row_ptr, first, end, aligned = _chunk(chunks_ptr, table_ptr, CHUNK)
    address, dtype = tl.load(row_ptr + G), tl.load(row_ptr + G_DTYPE)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(first, end, BLOCK):
        if aligned & (start + BLOCK <= end):
            g = _gradient(address, dtype, start, end, BLOCK, True)
        else:
            g = _gradient(address, dtype, start, end, BLOCK, False)
        squares += g * g
    tl.store(parts_ptr + tl.program_id(0), tl.sum(squares, axis=0))


# gradient, weight, exp_avg, exp_avg_sq, copy, step
Parameter = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]


class ParameterTable:
    """The parameters as the kernels see them: a row each, on the device, and the map from programs to rows."""

    def __init__(self, device: torch.device):
        self.device = device
        self._rows: list[tuple[int, ...]] = []
        self.tensors = self.chunks = self.numbers = torch.empty(0, device=device)

    def refresh(self, parameters: Sequence[Parameter]) -> None:
        """Send the rows of `parameters` if they have changed. ValueError on shapes, strides and devices; TypeError on
        dtypes. A captured graph sends its rows again at each replay."""
        rows = [_row(*parameter) for parameter in parameters]
        if rows == self._rows:
            return
        for parameter in parameters:
            _check(self.device, *parameter)
        sizes = [row[SIZE.value] for row in rows]
        if sizes != [row[SIZE.value] for row in self._rows]:
            self.chunks = _send(_chunks(sizes), self.device)
        self.tensors = _send(torch.tensor(rows, dtype=torch.int64), self.device, self.tensors)
        self._rows = rows

    def set_numbers(self, numbers: Tensor) -> None:
        """Send this step's numbers (tensors, LOG2_BETA2 + 1) to where the last ones were, so that graphs find them."""
        room = torch.zeros(len(numbers), NUMBERS.value - numbers.shape[1])  # for what the device computes
        self.numbers = _send(torch.cat([numbers.double(), room.double()], 1), self.device, self.numbers)


def _row(g: Tensor, w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, step: Tensor) -> tuple[int, ...]:
    addresses = g.data_ptr(), m.data_ptr(), v.data_ptr(), w.data_ptr(), 0 if copy is None else copy.data_ptr()
    dtypes = _DTYPE_NUMBER.get(g.dtype, -1), 0 if copy is None else _DTYPE_NUMBER.get(copy.dtype, -1)
    aligned = not any(address % 16 for address in addresses)
    return *addresses, step.data_ptr(), *dtypes, w.numel(), int(aligned)


_DTYPE_NUMBER = {dtype: i for i, dtype in enumerate(DTYPES)}


def _check(device: torch.device, g: Tensor, w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, step: Tensor) -> None:
    tensors = {"gradient": g, "exp_avg": m, "exp_avg_sq": v} | ({} if copy is None else {"copy": copy})
    check_tensors("adamw", weight=w, step=step, **tensors)
    check_shape("adamw", "step", step, ())
    if step.dtype != torch.float32:
        raise TypeError(f"adamw: step is {step.dtype}: it must be float32, as torch's own is")
    if w.device != device:
        raise ValueError(f"adamw: a weight is on {w.device} and the first one on {device}: move one of them")
    for name, tensor in tensors.items():
        check_shape("adamw", name, tensor, w.shape)
    for name, tensor in {"weight": w, **tensors}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"adamw: {name} has strides {tensor.stride()}: it must be contiguous")
        half = tensor.dtype != torch.float32
        if name != "gradient" and half != (name == "copy"):
            raise TypeError(f"adamw: {name} is {tensor.dtype}: weights and moments are float32, copies are half types")


def _chunks(sizes: Sequence[int]) -> Tensor:
    """Return (programs, 2): (row, index of the chunk in that tensor). A tensor without elements has no chunk."""
    counts = torch.tensor([triton.cdiv(size, launch.adamw_chunk().CHUNK) for size in sizes], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, torch.arange(len(tensor)) - before], 1).int()


def _send(host: Tensor, device: torch.device, place: Tensor | None = None) -> Tensor:
    """Copy `host` to `device`, into `place` if it fits, from pinned memory, so that the host need not wait for it."""
    if place is None or place.shape != host.shape or place.device != device:
        place = torch.empty_like(host, device=device)
    return place.copy_(host.pin_memory() if device.type == "cuda" else host, non_blocking=True)


def gradient_norm(table: ParameterTable) -> Tensor:
    """Return the norm of all gradients of `table` together: 0-d, fp32, on the device."""
    parts = torch.empty(len(table.chunks), device=table.device)
    if len(parts):
        with torch.cuda.device_of(parts):
            _adamw_norm_kernel[(len(parts),)](
                table_ptr=table.tensors, chunks_ptr=table.chunks, parts_ptr=parts,
                **launch.adamw_chunk(norm=True)._asdict(),
            )  # fmt: skip
    return parts.sum().sqrt()


def adamw_(table: ParameterTable, divisor: Tensor) -> None:
    """Update every parameter of `table` by its numbers; gradients are divided by `divisor` (0-d, fp32). If that is not
    finite, nothing changes."""
    if n := len(table.tensors):
        with torch.cuda.device_of(table.tensors):
            _adamw_count_kernel[(triton.cdiv(n, COUNTED),)](
                table_ptr=table.tensors, numbers_ptr=table.numbers, divisor_ptr=divisor, n=n, BLOCK=COUNTED,
                num_warps=4,
            )  # fmt: skip
    if len(table.chunks):
        with torch.cuda.device_of(table.chunks):
            _adamw_kernel[(len(table.chunks),)](
                table_ptr=table.tensors, chunks_ptr=table.chunks, numbers_ptr=table.numbers, divisor_ptr=divisor,
                **launch.adamw_chunk()._asdict(),
            )  # fmt: skip
