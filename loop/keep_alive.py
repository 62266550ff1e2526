# SPDX-License-Identifier: Apache-2.0
"""How long a TCP connection outlives a peer whose host is gone: a minute, in which nothing came.

A peer that has died with its process is told of by its kernel, at once. One whose host lost power,
or whose cable was pulled, is silent, and a request to it would wait for good. So an idle connection
is probed, and data that isn't acknowledged in time ends it as well. A peer that lives, and takes
long, isn't noticed by this, and isn't meant to be: a disk below it may be slow.
"""

from __future__ import annotations

import socket
from typing import Final

IDLE_S: Final = 30
"""Without a word from the peer, until it is asked whether it is there."""

PROBE_S: Final = 10
PROBES: Final = 3
"""Asked so often, with so much time between; then it is gone."""

GONE_MS: Final = (IDLE_S + PROBE_S * PROBES) * 1000
"""The same bound for data that the peer's kernel doesn't acknowledge."""


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel end a connection whose peer's host is gone. No-op on other than TCP."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, IDLE_S),
        (socket.TCP_KEEPINTVL, PROBE_S),
        (socket.TCP_KEEPCNT, PROBES),
        (socket.TCP_USER_TIMEOUT, GONE_MS),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
