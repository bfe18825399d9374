"""The device and the precision of a run, chosen once at start-up; memory, threads, CUDA graphs and streams."""

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
    """Return the device called `name`; "auto" is CUDA, else MPS, else CPU. UserError if a named device is absent.

    With several ranks, each takes the GPU whose index is its local rank, and makes it torch's current device.
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
        raise UserError(f"unknown device {name!r}: use auto, cuda, cuda:1, mps or cpu") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"device {name} was asked for, and torch sees {count} CUDA devices: use --device auto or cpu"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device mps was asked for, and torch sees none: use --device auto or cpu")
    elif device.type != "cpu":
        raise UserError(f"device {name} is not supported: use cuda, mps or cpu")
    return device


def _pick_for_rank(name: str, world: World) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(
            f"--device {name} with {world.size} processes: use cuda, where each process takes one GPU, or cpu"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world.local_rank >= count:
        raise UserError(
            f"this machine runs more processes than torch sees GPUs ({count}): start torchrun with "
            f"--nproc-per-node {max(1, count)}, or use --device cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def pick_precision(name: Precision | Literal["auto"], device: torch.device, interpreted: bool = False) -> Precision:
    """Return the precision called `name`; "auto" is bf16 where matrix units support it, fp16 on other CUDA GPUs, else
    fp32.

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
    """Return whether bf16 matmuls are faster than fp32 ones, not merely supported."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    if "amx_bf16" not in flags and "avx512_bf16" not in flags:
        return False
    # ONEDNN_MAX_CPU_ISA may keep oneDNN from these instructions: it then multiplies bf16 100 times slower than fp32.
    # ATEN_CPU_CAPABILITY may keep ATen: its attention then raises "pack_vnni2 is only supported when avx512 is"
    aten = torch.backends.cpu.get_cpu_capability()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and aten.startswith("AVX512")


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """Return torch's autocast for bf16 and fp16, and a context that does nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def set_tf32(device: torch.device, on: bool) -> None:
    """Compute fp32 matmuls on CUDA tensor cores with 10 mantissa bits (TF32), or exactly."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if on else "highest")


def set_deterministic(device: torch.device, on: bool) -> None:
    """Use algorithms that give the same bits every time, or the fastest ones. torch raises for an operation that has no
    deterministic algorithm.

    torch applies this to SDPA (flash sums in a fixed order, memory-efficient does not split the keys, cuDNN is not
    used) and to Inductor, which then does not benchmark candidates.
    """
    if on and device.type == "mps":
        raise UserError(
            "--deterministic works on CPU and CUDA only: torch's embedding has no deterministic gradient on MPS"
        )
    if on and device.type == "cuda":
        # cuBLAS reads it when it starts, and torch refuses to multiply with any other value
        given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if given not in (":4096:8", ":16:8"):
            raise UserError(
                f"CUBLAS_WORKSPACE_CONFIG is {given}: --deterministic needs :4096:8 or :16:8: set one, or unset it"
            )
    if on != torch.are_deterministic_algorithms_enabled():  # the call imports Inductor, which takes 2 s
        torch.use_deterministic_algorithms(on)
    # filling new memory with NaN would expose reads of unwritten memory, at a pass over it each time; tests do that
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property that the module gets at run time


@contextlib.contextmanager
def any_algorithm() -> Iterator[None]:
    """Allow operations without a deterministic algorithm, such as torch 2.11's cumsum on CUDA, within the context."""
    on = torch.are_deterministic_algorithms_enabled()
    if on:
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        if on:
            torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep freed memory, and return whether it will; False if the C library is not glibc.

    By default every tensor above 32 MB is a new mapping that is returned to the kernel when it is freed, so each step
    pays for clearing all of its pages again. That costs as much as the arithmetic: nano trains 1.9 times as fast in
    fp32 with this, on two cores (benchmarks/NOTES.md). Call it once, at the start of a program.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    # -1 means never; the largest number, 2 GB, would trim the heap in every gpt2 step
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 * 2**20))
    done = [mallopt(option, value) for option, value in settings]
    return all(done)


def use_allowed_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> None:
    """Limit torch's threads to the container's CPU quota, unless OMP_NUM_THREADS is set.

    torch counts the machine's cores and ignores quotas; threads beyond the quota are suspended, and all others wait for
    them.
    """
    quota = cpu_quota(cgroup)
    if quota is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), round(quota))))


def cpu_quota(cgroup: Path) -> float | None:
    """Return how many cores' time Linux's control groups (version 2, or 1) grant this process; None: no limit."""
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
    """Return the device's name as the driver or the operating system reports it."""
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
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def record_graph(work: Callable[[], object], other: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """Record `work` as a CUDA graph, without executing it.

    What it allocates comes from the memory pool of `other`, or from a new one, and is kept as long as the graph.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=other.pool() if other else None):
        work()
    return graph


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run the block on a side stream: autograd remembers streams, and recording must not depend on the default one."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
