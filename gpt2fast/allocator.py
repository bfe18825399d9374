"""glibc's allocator, told to keep the memory it has.

By default every tensor above 32 MB is a fresh mapping that goes back to the kernel when it is freed, so that each
step pays for clearing all of its pages again. That costs as much as the arithmetic: nano trains 1.9 times as fast in
fp32 with this, on two cores (benchmarks/NOTES.md).
"""

import ctypes
import platform

# malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Call once, at the start of a program that computes on the CPU. False where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    # -1 is never; the largest number, 2 GB, would trim the heap of a gpt2 step each time
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 * 2**20))
    done = [mallopt(option, value) for option, value in settings]
    return all(done)
