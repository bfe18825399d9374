"""The error when memory runs out: one line with the numbers and the remedy."""

import torch

from gpt2fast.errors import RunError
from gpt2fast.model import SIZES
from gpt2fast.training.config import Resolved
from gpt2fast.training.flops import parameters


def out_of_memory(c: Resolved, begun: bool = False) -> RunError:
    """Return the error that says what to lower, and to what.

    `begun`: the run has begun, so that it can only be resumed, with its own batch size.
    """
    halves = [b for b in range(c.batch_size // 2, 0, -1) if c.total_batch % (b * c.seq_len) == 0]
    smaller = [name for name, size in SIZES.items() if parameters(size) < parameters(c.model)]
    if begun or c.resume:
        remedy = "free the memory that other processes use, then continue with --resume"
        remedy += "" if c.recompute else ", and with --recompute, which keeps less"
    elif halves:
        remedy = f"use --batch-size {halves[0]}; a step stays the same, in more micro-batches"
    elif not c.recompute:
        remedy = "use --recompute, which keeps less of each block"
    elif c.seq_len > 1 and c.seq_len % 2 == 0:
        remedy = f"use --seq-len {c.seq_len // 2}"
    else:
        remedy = f"train the preset {smaller[-1]}" if smaller else "train a smaller model"
    sizes = f"--batch-size {c.batch_size} and --seq-len {c.seq_len}"
    return RunError(f"out of memory with {sizes}{_gpu_memory()}: {remedy}")


def _gpu_memory() -> str:
    """Return the peak memory of this run, and the total and free memory of its GPU; "" without CUDA."""
    try:
        free, total = torch.cuda.mem_get_info()
        most = torch.cuda.max_memory_allocated()
    except (RuntimeError, AssertionError):  # no CUDA, or a context that was lost
        return ""
    gigabytes = [f"{number / 1e9:.1f}" for number in (most, total, free)]
    return " (this run used up to {} GB of the device's {}, and {} are free)".format(*gigabytes)
