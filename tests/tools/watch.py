"""Watches a pytest process from outside: measures what it and its processes take, and kills them when it has ended.

Run as a file by `accounts`, in a Python without site-packages. Arguments: the process's id, the mark that it puts into
the environment of all that it starts, and where to write. Its standard input ends when that process ends, however that
happens: then whatever has the mark and still lives is killed. Linux only: it reads /proc.
"""

import contextlib
import os
import select
import signal
import sys
import time

EVERY = 1.0  # seconds between two measurements


def marked(mark: bytes) -> list[int]:
    """Processes that inherited the mark, but for this one."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read():
                    found.append(int(name))
    return found


def memory(pid: int) -> int:
    """Bytes of it: pages that n processes share count an nth in each."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def kill_all(mark: bytes) -> None:
    """Until none is left: one may have been starting another."""
    for _ in range(100):
        left = marked(mark)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def main(watched: int, mark: bytes, out: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    peak = 0
    while not select.select([0], [], [], EVERY if out else None)[0]:
        peak = max(peak, sum(map(memory, [watched, *marked(mark)])))
        with open(out, "w") as file:
            file.write(str(peak))
    kill_all(mark)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].encode(), sys.argv[3])
