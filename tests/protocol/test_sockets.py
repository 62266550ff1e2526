# SPDX-License-Identifier: Apache-2.0
"""What the document says of the sockets themselves. Section "Protocol phases"."""

from __future__ import annotations

import os
import socket

from blockemu.exports import ExportTable
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.nbd.server import NbdServer


def end_of(client: socket.socket) -> socket.socket:
    """Our copy of the server's end of a TCP connection: both are in this process."""
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # no socket, or the listing's own descriptor
        try:
            if sock.getpeername() == client.getsockname():
                return sock
        except OSError:
            pass
        sock.close()
    raise AssertionError("the server has no such socket")


def test_a_tcp_clients_small_replies_arrive_at_once() -> None:
    ctx = AioContext("test")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    address = listener.getsockname()
    server = NbdServer(ctx, ExportTable(), limits=Limits())
    server.listen(listener)
    try:
        with socket.create_connection(address) as client:
            client.setblocking(False)
            while server.connection_count == 0:
                ctx.poll(blocking=True)
            with end_of(client) as theirs:
                assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        ctx.run(server.close())
        ctx.close()
