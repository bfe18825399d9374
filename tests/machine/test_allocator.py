"""glibc's allocator, told to keep freed memory: in a process of its own, since it cannot be told to forget that."""

import platform

CODE = """
import platform
from gpt2fast.machine import device
print(device.keep_freed_memory())
platform.libc_ver = lambda: ("", "")
print(device.keep_freed_memory())
"""


def test_allocator_settings_are_taken_by_glibc_only(run_python):
    glibc = platform.libc_ver()[0] == "glibc"
    assert run_python("-c", CODE, check=True).stdout.split() == [str(glibc), "False"]
