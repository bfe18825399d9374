"""Profile a training step with torch.profiler: device time by group of kernels, beside benchmarks/floor.py's floor."""

import re
import time
from dataclasses import asdict

import torch
from torch.autograd import DeviceType

from benchmarks import floor, ladder
from benchmarks.harness import peak_memory
from benchmarks.rungs import Rung, refusal, training_step
from gpt2fast.errors import UserError
from gpt2fast.machine.device import synchronize

STEPS = 3
# The first pattern that a kernel's name matches decides. Names: cuBLAS, cuDNN, CUTLASS, ATen, Inductor, our own.
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matmul": r"gemm|nvjet|splitk|triton_tem|cutlass|xmma|cublas|matmul|^_linear_|linear_kernel"
    r"|aten::(b|add|baddb)?mm_?$|mkldnn",
    "optimizer": r"adam|multi_tensor_apply|lpnorm|foreach|linalg_vector_norm|square_sum|aten::dot",
    "cross-entropy": r"softmax|nll|cross_entropy|logsumexp|^_scale_kernel",
    "layer norm": r"layer_?norm|gammabeta",
    "gelu": r"gelu",
    "embedding": r"embedding|index|gather|scatter|sort|radix",
    "copy": r"^(?!triton_(red|per)_.*sum).*(memcpy|memset|copy|cat_|fill)",  # a bias gradient may end in a cast
    "elementwise": r"elementwise|triton_(poi|red|per)|aten::(add|mul|div|sum)|reduce",
}


def group_of(kernel: str) -> str:
    """Return the group of a kernel's name, or "other"."""
    name = kernel.lower()
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "other")


def measure(rung: Rung, size: str, B: int, T: int, device: torch.device, steps: int = STEPS) -> dict:
    """Profile `steps` training steps of this rung. On a CPU (for tests) ops take the place of kernels."""
    common = {"backend": rung.backend, "rung": rung.name, "size": size, "B": B, "T": T, "compile": rung.compile}
    try:
        if why := refusal(rung, device):
            raise UserError(why)
        take_step = training_step(rung, size, T, device)
    except UserError as error:
        return common | {"status": "skipped", "why": str(error)}
    batches = ladder.endless_batches(take_step.model.config.vocab_size, B, T, device)
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
    return common | {
        "options": asdict(rung.counted),
        "wall_ms": 1e3 * wall,
        "peak_memory": peak_memory(device),
        **by_group({name: ms / steps for name, ms in kernels.items()}),
    }


def kernel_times(profiler: torch.profiler.profile, device: torch.device) -> dict[str, float]:
    """Return milliseconds by kernel name. Annotations that span kernels are left out, so nothing counts twice."""
    if device.type != "cuda":
        return {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    times: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            times[event.name] = times.get(event.name, 0.0) + event.self_device_time_total / 1e3
    return times


def by_group(kernels: dict[str, float], top: int = 25) -> dict:
    """Return {"device_ms": sum, "groups": {group: ms}, "kernels": the longest}, from milliseconds by kernel name."""
    groups: dict[str, float] = {}
    for name, ms in kernels.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + ms
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:top]
    return {
        "device_ms": sum(kernels.values()),
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "kernels": [[name[:160], round(ms, 4)] for name, ms in longest],
    }


def table(row: dict, ceilings: floor.Ceilings) -> str:
    """Return the row as a table, beside the times that an ideal step and this one would take at these ceilings."""
    if "groups" not in row:
        return f"profile of {row['rung']}: {row['status']}: {row['why']}"
    lines = [f"one step of {row['size']}, {row['rung']}, B {row['B']}, T {row['T']}: {row['wall_ms']:.1f} ms\n"]
    return "\n".join([*lines, floor.table(floor.beside(row, ceilings))])
