"""keep_freed_memory: in a separate process, since the setting cannot be undone."""

import platform

CODE = """
import platform
from gpt2fast.machine import device
print(device.keep_freed_memory())
platform.libc_ver = lambda: ("", "")
print(device.keep_freed_memory())
"""


def test_only_glibc_accepts_the_allocator_settings(run_python):
    glibc = platform.libc_ver()[0] == "glibc"
    assert run_python("-c", CODE, check=True).stdout.split() == [str(glibc), "False"]
