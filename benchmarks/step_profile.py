"""One training step's device time by group of kernels, from torch.profiler."""

import re
import time

import torch
from torch.autograd import DeviceType

from benchmarks import ladder
from benchmarks.harness import peak_memory
from gpt2fast import optim
from gpt2fast.device import set_tf32
from gpt2fast.errors import UserError
from gpt2fast.model import GPT, SIZES
from gpt2fast.ops import OpsConfig, build
from gpt2fast.step import TrainingStep, synchronize

STEPS = 3
FLOOR_MS = 76.4  # gpt2, B=64, T=1024, on an H200: matmuls at 790 TFLOP/s, the rest at 4.3 TB/s
# The first pattern that fits a kernel's name decides. Names of cuBLAS, cuDNN, CUTLASS, ATen, Inductor, and our own.
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matmul": r"gemm|nvjet|splitk|triton_tem|cutlass|xmma|cublas|matmul|linear_kernel|aten::(b|add|baddb)?mm_?$|mkldnn",
    "optimizer": r"adam|multi_tensor_apply|lpnorm|foreach|linalg_vector_norm|aten::dot",
    "cross-entropy": r"softmax|nll|cross_entropy|logsumexp",
    "layer norm": r"layer_?norm|gammabeta",
    "gelu": r"gelu",
    "embedding": r"embedding|index|gather|scatter|sort|radix",
    "copy": r"memcpy|memset|copy|cat_|fill",
    "elementwise": r"elementwise|triton_(poi|red|per)|aten::(add|mul|div|sum)|reduce",
}


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "other")


def measure(backend: str, size: str, B: int, T: int, device: torch.device, compile: bool, steps: int = STEPS) -> dict:
    """Profile `steps` training steps, bf16. On the CPU (for tests) ops take the place of kernels."""
    try:
        ops = build(OpsConfig().with_backend(backend), device.type)
    except UserError as error:
        return {"backend": backend, "status": "skipped", "why": str(error)}
    set_tf32(device, True)
    model = GPT(SIZES[size], ops).to(device)
    take_step = TrainingStep(model, optim.adamw(model, 0.1), precision="bf16", compile=compile)
    batches = ladder.endless_batches(model.config.vocab_size, B, T, device)
    for _ in range(3):
        take_step(batches, ladder.LEARNING_RATE)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        take_step(batches, ladder.LEARNING_RATE)
    synchronize(device)
    wall = (time.perf_counter() - start) / steps
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            take_step(batches, ladder.LEARNING_RATE)
        synchronize(device)
    kernels = kernel_times(profiler, device)
    return {
        "backend": backend,
        "size": size,
        "B": B,
        "T": T,
        "compile": compile,
        "wall_ms": 1e3 * wall,
        "peak_memory": peak_memory(device),
        **by_group({name: ms / steps for name, ms in kernels.items()}),
    }


def kernel_times(profiler: torch.profiler.profile, device: torch.device) -> dict[str, float]:
    """Milliseconds by kernel name. Annotations that span kernels are left out, so nothing counts twice."""
    if device.type != "cuda":
        return {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    times: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            times[event.name] = times.get(event.name, 0.0) + event.self_device_time_total / 1e3
    return times


def by_group(kernels: dict[str, float], top: int = 25) -> dict:
    """{"device_ms": sum, "groups": {group: ms}, "kernels": the longest}, from ms a step by kernel name."""
    groups: dict[str, float] = {}
    for name, ms in kernels.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + ms
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:top]
    return {
        "device_ms": sum(kernels.values()),
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "kernels": [[name[:160], round(ms, 4)] for name, ms in longest],
    }


def table(row: dict) -> str:
    if "groups" not in row:
        return f"profile of {row['backend']}: {row['status']}: {row['why']}"
    total = row["device_ms"]
    lines = [f"one step of {row['size']}, {row['backend']}, B {row['B']}, T {row['T']}: {row['wall_ms']:.1f} ms"]
    lines += [f"  {group:<14}{ms:>9.2f} ms {100 * ms / total:>5.1f}%" for group, ms in row["groups"].items()]
    lines.append(f"  {'all kernels':<14}{total:>9.2f} ms")
    if (row["size"], row["B"], row["T"]) == ("gpt2", 64, 1024):
        lines.append(f"  {'floor':<14}{FLOOR_MS:>9.2f} ms")
    return "\n".join(lines)
