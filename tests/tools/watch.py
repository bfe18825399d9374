"""A process that measures the memory of a pytest process and its children, and kills the children when it has ended.

`accounts` runs this file, in a Python without site-packages. Arguments: the pytest process's id, the mark that it puts
into the environment of all that it starts, and the file to write. This process's standard input ends when the pytest
process ends, however that happens; then all processes with the mark are killed. Linux only: it reads /proc.
"""

import contextlib
import os
import select
import signal
import sys
import time

EVERY = 1.0  # seconds between two measurements


def marked(mark: bytes) -> list[int]:
    """Return the processes that inherited the mark, without this one."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read():
                    found.append(int(name))
    return found


def memory(pid: int) -> int:
    """Return a process's memory in bytes; a page that n processes share counts 1/n."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def kill_all(mark: bytes) -> None:
    """Kill until no process is left, since one may be starting another."""
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
