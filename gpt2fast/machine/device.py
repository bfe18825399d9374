"""Which device, and in which precision: decided once, at start-up, from what is there."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from gpt2fast.errors import UserError
from gpt2fast.machine.world import ALONE, World

Precision = Literal["fp32", "bf16", "fp16"]
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto", world: World = ALONE) -> torch.device:
    """ "auto": CUDA, else MPS, else CPU. A device that is asked for by name and absent is a UserError.

    Of several ranks each takes the GPU of its number on its machine, and makes it torch's current one.
    """
    if world.size > 1:
        return _pick_for_rank(name, world)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: auto, cuda, cuda:1, mps and cpu are known") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"device {name} was asked for, and torch sees {count} CUDA devices: use --device auto or cpu"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device mps was asked for, and this torch has none: use --device auto or cpu")
    elif device.type != "cpu":
        raise UserError(f"device {name} is not supported: use cuda, mps or cpu")
    return device


def _pick_for_rank(name: str, world: World) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} with {world.size} processes: use cuda, of which each takes its own, or cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world.local_rank >= count:
        raise UserError(
            f"this machine runs more processes than it has GPUs, of which torch sees {count}: start torchrun with "
            f"--nproc-per-node {max(1, count)}, or use --device cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def pick_precision(name: Precision | Literal["auto"], device: torch.device, interpreted: bool = False) -> Precision:
    """ "auto": bf16 where the matrix units do it, fp16 on a CUDA GPU that lacks it, else fp32.

    `interpreted`: some kernels run in Triton's interpreter, which computes bf16 wrongly.
    """
    if interpreted and name == "bf16":
        raise UserError("Triton's interpreter (TRITON_INTERPRET=1) computes bf16 wrongly: use --precision fp32")
    if interpreted and name == "auto":
        return "fp32"
    if name != "auto":
        if name == "bf16" and device.type == "cuda" and not _cuda_has_bf16(device):
            raise UserError(f"{device_name(device)} has no bf16 units: use --precision fp16 or fp32")
        if name == "fp16" and device.type != "cuda":
            raise UserError(
                f"fp16 needs a CUDA GPU (its loss scaling does), and this run is on {device}: use bf16 or fp32"
            )
        return name
    if device.type == "cuda":
        return "bf16" if _cuda_has_bf16(device) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cuda_has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # is_bf16_supported() also says yes to emulation


def _cpu_has_bf16() -> bool:
    """Whether bf16 matmuls are faster than fp32 ones, not merely possible."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    if "amx_bf16" not in flags and "avx512_bf16" not in flags:
        return False
    # oneDNN may be told to do without (ONEDNN_MAX_CPU_ISA), and then multiplies bf16 a hundred times slower than fp32;
    # ATen too (ATEN_CPU_CAPABILITY), and then raises in its attention: "pack_vnni2 is only supported when avx512 is"
    aten = torch.backends.cpu.get_cpu_capability()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and aten.startswith("AVX512")


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """torch's autocast for bf16 and fp16; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def set_tf32(device: torch.device, on: bool) -> None:
    """fp32 matmuls on CUDA tensor cores with 10 mantissa bits, or exact."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if on else "highest")


def set_deterministic(device: torch.device, on: bool) -> None:
    """Algorithms that give the same bits every time, or the fastest. torch raises where an operation has no such.

    torch extends it to SDPA (flash with ordered sums, memory-efficient with keys in one piece, cuDNN not at all) and to
    Inductor, which then measures no candidates.
    """
    if on and device.type == "mps":
        raise UserError("--deterministic is for CPU and CUDA: torch's embedding has no such gradient on MPS")
    if on and device.type == "cuda":
        # cuBLAS reads it when it starts, and torch refuses to multiply with any other
        given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if given not in (":4096:8", ":16:8"):
            raise UserError(f"CUBLAS_WORKSPACE_CONFIG is {given}: --deterministic needs :4096:8 or :16:8, or none set")
    if on != torch.are_deterministic_algorithms_enabled():  # the call alone imports Inductor, in two seconds
        torch.use_deterministic_algorithms(on)
    # NaN in all new memory finds who reads what nobody wrote, in a pass over it each time; tests find that too
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module, made at run time


@contextlib.contextmanager
def any_algorithm() -> Iterator[None]:
    """Within it, operations that have no deterministic algorithm run: torch 2.11's cumsum on CUDA is one."""
    on = torch.are_deterministic_algorithms_enabled()
    if on:
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        if on:
            torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep the memory it has; False where the C library is not glibc.

    By default every tensor above 32 MB is a fresh mapping that goes back to the kernel when it is freed, so that each
    step pays for clearing all of its pages again. That costs as much as the arithmetic: nano trains 1.9 times as fast
    in fp32 with this, on two cores (benchmarks/NOTES.md). Call it once, at the start of a program.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    # -1 is never; the largest number, 2 GB, would trim the heap of a gpt2 step each time
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 * 2**20))
    done = [mallopt(option, value) for option, value in settings]
    return all(done)


def use_allowed_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> None:
    """No more threads than a container's CPU quota keeps busy. torch counts the machine's cores and knows no quota; and
    threads that wait for their share make all others wait. A user's OMP_NUM_THREADS is left alone.
    """
    quota = cpu_quota(cgroup)
    if quota is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), round(quota))))


def cpu_quota(cgroup: Path) -> float | None:
    """Cores' worth of time that Linux's control groups (version 2, or 1) grant this process; None: all there is."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def device_name(device: torch.device) -> str:
    """As the driver or the operating system spells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else f"Apple {platform.machine()} GPU"
    )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def record_graph(work: Callable[[], object], other: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """`work`, which is not done now. What it allocates comes from the memory of `other`, or new, and is never given
    back while the graph lives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=other.pool() if other else None):
        work()
    return graph


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """On a stream of its own: autograd remembers streams, and recording must not depend on the default one."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
