# SPDX-License-Identifier: Apache-2.0
"""What a connected socket is told before it is used, and asked before it is closed."""

from __future__ import annotations

import socket
from dataclasses import dataclass

BUFFER_BYTES = 1024 * 1024
"""Asked of the kernel for each direction: a big reply then leaves in one piece."""

# Not in Python's socket module; Linux, asm-generic/socket.h.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAlive:
    """When a TCP peer that has fallen silent is asked whether it still lives: after how many
    seconds, how often again, and how many questions without an answer mean that it doesn't."""

    idle_s: int
    interval_s: int
    probes: int


def tune(sock: socket.socket, keepalive: KeepAlive | None = None) -> None:
    """Let the kernel hold a big reply, don't let it hold back a small one, and, with `keepalive`,
    have it end the connection of a TCP peer that is gone without a word."""
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
        if keepalive is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive.idle_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive.interval_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, keepalive.probes)


def may_lose_data(sock: socket.socket) -> bool:
    """Whether closing `sock` now may destroy what was sent on it.

    It does where input lies unread or arrives later: TCP then resets the connection, and takes back
    what the peer hasn't acknowledged. A unix socket's peer keeps what it was sent, but is told of
    an error when it next sends, and might not look at it.
    """
    return sock.family != socket.AF_UNIX or has_input(sock)


def has_input(sock: socket.socket) -> bool:
    """Whether something has arrived on the non-blocking `sock` that nobody has read yet."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False
