"""The TCP connections of this process: detect that another host is lost, and let others detect that this process ends.

gloo and torchrun's store do not expose their sockets, so they are looked up among the process's open files. Where there
is no /proc (not Linux) both functions do nothing, and a lost host is noticed only after PATIENCE (world.py).
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

LOST = 30  # seconds after which a host that does not answer counts as lost


def hang_up() -> None:
    """Shut down all connections but the store's, so that ranks that only wait for this one get an error."""
    port = int(os.environ["MASTER_PORT"])
    for connection in _connections():
        with contextlib.suppress(OSError):  # a listening socket has no peer
            if port not in (connection.getpeername()[1], connection.getsockname()[1]):
                connection.shutdown(socket.SHUT_RDWR)


def notice_lost_hosts() -> None:
    """Make the kernel raise an error on connections to a host that has not answered for LOST seconds.

    A host that loses power or network closes no connection, and gloo and the store would wait for PATIENCE.
    """
    for connection in _connections():
        with contextlib.suppress(OSError):  # closed in the meantime
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # probes while nothing is sent
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST // 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST // 6)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST * 1000)  # while data is


def _connections() -> Iterator[socket.socket]:
    """Yield the TCP sockets of this process; none where there is no /proc (not Linux)."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # closed in the meantime
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if internet and connection.type == socket.SOCK_STREAM:
                        yield connection
