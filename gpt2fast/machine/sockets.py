"""The TCP connections of this process: find out that a host is gone, and let others find out that this one is.

gloo and torchrun's store keep their sockets to themselves, so they are looked for among the process's open files. Where
there is no /proc (not Linux) both functions do nothing, and a lost host is noticed only after PATIENCE (world.py).
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

LOST = 30  # seconds after which a host that does not answer counts as gone


def hang_up() -> None:
    """Shut all connections but the store's, so that those notice who only wait for this process."""
    port = int(os.environ["MASTER_PORT"])
    for connection in _connections():
        with contextlib.suppress(OSError):  # some only listen
            if port not in (connection.getpeername()[1], connection.getsockname()[1]):
                connection.shutdown(socket.SHUT_RDWR)


def notice_lost_hosts() -> None:
    """Ask the kernel for an error on connections to a host that has not answered for LOST seconds.

    One without power or network says no farewell, and gloo and the store would wait for as long as PATIENCE.
    """
    for connection in _connections():
        with contextlib.suppress(OSError):  # closed by now
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # while nothing is sent: ask
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST // 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST // 6)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST * 1000)  # while something is


def _connections() -> Iterator[socket.socket]:
    """The sockets of this process that lead to others, where there is a /proc: Linux."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # closed by now
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if internet and connection.type == socket.SOCK_STREAM:
                        yield connection
