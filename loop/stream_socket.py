# SPDX-License-Identifier: Apache-2.0
"""Connected stream sockets for those who are clients: a name is resolved and a connection made
without holding up the loop.

Looking a host's name up may take seconds and has no non-blocking form, so it runs on the thread
pool. A host may have several addresses; they are tried one after the other, in the resolver's
order.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from blockemu.loop.coroutine import Future
from blockemu.loop.current import running_context
from blockemu.loop.socket_options import tune
from blockemu.loop.sync import sleep_ns

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext


PlainSocket = socket.socket
"""One of the kernel's, as the two functions below make them."""


class StreamSocket(Protocol):
    """A connected, non-blocking socket as a connection uses it: one of the kernel's, or a
    `TlsStream`. All raise BlockingIOError when nothing can be done now, else OSError."""

    def fileno(self) -> int: ...
    def recv(self, bufsize: int, /) -> bytes: ...
    def recv_into(self, buffer: memoryview, /) -> int: ...
    def recvmsg_into(self, buffers: list[memoryview], /) -> tuple[int, Any, Any, Any]: ...
    def send(self, data: bytes | memoryview, /) -> int: ...
    def sendmsg(self, buffers: Sequence[bytes | memoryview], /) -> int: ...
    def close(self) -> None: ...


UNIX_PATH_BYTES_MAX = 107
"""sun_path is 108 bytes with its final NUL (unix(7))."""


def has_buffered(sock: StreamSocket) -> bool:
    """Whether `sock` may have input of its own left, which no poll tells of (tls_stream.py)."""
    return getattr(sock, "buffered", False)


QUEUE_FULL_PAUSE_NS = 10_000_000
"""Until a unix server whose queue of new connections is full is asked again."""


KEEP_ALIVE_IDLE_S = 30
"""Without a word from the peer, until its kernel is asked whether it is there."""

KEEP_ALIVE_PROBE_S = 10
KEEP_ALIVE_PROBES = 3
"""Asked so often, with so much time between; then it is gone."""

GONE_MS = (KEEP_ALIVE_IDLE_S + KEEP_ALIVE_PROBE_S * KEEP_ALIVE_PROBES) * 1000
"""The same bound for data that the peer's kernel doesn't acknowledge; TCP's own is 15 minutes."""


async def connect_unix(path: str) -> socket.socket:
    """Connect to the unix socket at `path`: close-on-exec and tuned, as by `connect_tcp`.

    Context: a task. Suspends: while the server's queue is full. Raises: OSError.
    """
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        reason = f"a socket path has at most {UNIX_PATH_BYTES_MAX} bytes"
        raise OSError(errno.ENAMETOOLONG, reason)
    return await _connect(socket.AF_UNIX, socket.SOCK_STREAM, 0, path)


async def connect_tcp(
    host: str, port: int, *, ipv4: bool = True, ipv6: bool = True, keep_alive: bool = False
) -> socket.socket:
    """Connect to `port` of `host`, a name or an address, of IPv4 or IPv6 where these may be.

    `keep_alive`: have the kernel end the connection when the peer's host is gone.

    Context: a task. Suspends: until a connection is made, or none could be.
    Raises: OSError, that of the last address that was tried.
    """
    last: OSError | None = None
    family = socket.AF_UNSPEC
    if ipv4 != ipv6:
        family = socket.AF_INET if ipv4 else socket.AF_INET6
    for of, kind, protocol, address in await _addresses(host, port, family):
        try:
            sock = await _connect(of, kind, protocol, address)
            if keep_alive:
                _keep_alive(sock)
            return sock
        except OSError as error:
            last = error
    raise last or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


async def connect_vsock(cid: int, port: int) -> socket.socket:
    """Connect to `port` of the virtual machine (or host) with the context id `cid`.

    Context: a task. Suspends: until it is connected. Raises: OSError.
    """
    return await _connect(socket.AF_VSOCK, socket.SOCK_STREAM, 0, (cid, port))


def adopt_stream(fd: int) -> socket.socket:
    """A connected stream socket that somebody handed us; a descriptor of its own. `fd` stays open.

    Raises: OSError, if it is no such socket.
    """
    sock = socket.socket(fileno=os.dup(fd))
    try:
        if sock.type != socket.SOCK_STREAM:
            raise OSError(errno.EPROTOTYPE, "it is no stream socket")
        sock.getpeername()
        os.set_inheritable(sock.fileno(), False)
        sock.setblocking(False)
        tune(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _keep_alive(sock: socket.socket) -> None:
    """A peer that died with its process is told of by its kernel, at once. One whose host lost
    power, or whose cable was pulled, is silent, and a request to it would wait for good. One that
    lives, and takes long, isn't noticed by this: a disk below it may be slow."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEP_ALIVE_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEP_ALIVE_PROBE_S),
        (socket.TCP_KEEPCNT, KEEP_ALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, GONE_MS),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def _addresses(
    host: str, port: int, family: socket.AddressFamily
) -> list[tuple[int, int, int, Any]]:
    def look_up() -> list[tuple[int, int, int, Any]]:
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
        unique = dict.fromkeys(found)
        return [(family, kind, protocol, to) for family, kind, protocol, _, to in unique]

    try:
        return await running_context().thread_pool.run(look_up)
    except socket.gaierror as error:
        # Its numbers aren't errnos.
        raise OSError(errno.EADDRNOTAVAIL, error.strerror) from error
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "not a host name") from error


async def _connect(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        ctx = running_context()
        code = sock.connect_ex(address)
        while code == errno.EAGAIN and family == socket.AF_UNIX:
            # The server's queue is full; the kernel tells nobody when it no longer is.
            await sleep_ns(QUEUE_FULL_PAUSE_NS)
            code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            await _writable(ctx, sock.fileno())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        tune(sock)
    except BaseException:
        sock.close()
        raise
    return sock


async def _writable(ctx: AioContext, fd: int) -> None:
    future: Future[None] = Future()

    def ready() -> None:
        if not future.done():
            future.set_result(None)

    ctx.set_fd_handler(fd, write=ready)
    try:
        await future
    finally:
        ctx.set_fd_handler(fd)
