# SPDX-License-Identifier: Apache-2.0
"""What a client's socket is told before it is used."""

from __future__ import annotations

import socket

BUFFER_BYTES = 1024 * 1024
"""Asked of the kernel for each direction: a big reply then leaves in one piece."""

# Not in Python's socket module; Linux, asm-generic/socket.h.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33


def tune(sock: socket.socket) -> None:
    """Let the kernel hold a big reply, and don't let it hold back a small one."""
    for forced, asked in (
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER_BYTES)
        except OSError:
            # Beyond net.core.*mem_max only root may go; up to it everybody.
            sock.setsockopt(socket.SOL_SOCKET, asked, BUFFER_BYTES)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
