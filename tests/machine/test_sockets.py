"""TCP connections of this process: a lost host is detected, and other ranks detect that this one ends."""

import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="connections are found in /proc")

CODE = """
import os, socket
from gpt2fast.machine import sockets

def connected():
    listener = socket.create_server(("127.0.0.1", 0))
    mine = socket.create_connection(listener.getsockname())
    return mine, listener.accept()[0]

store, other = connected(), connected()
sockets.notice_lost_hosts()
print([s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for s in (*store, *other)])
print(other[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
os.environ["MASTER_PORT"] = str(store[0].getpeername()[1])
sockets.hang_up()
print(other[1].recv(1))
store[0].sendall(b"x")
print(store[1].recv(1))
"""


def test_all_connections_get_keepalive_and_all_but_the_stores_are_shut_down(run_python):
    assert run_python("-c", CODE, check=True).stdout.splitlines() == ["[1, 1, 1, 1]", "30000", "b''", "b'x'"]
