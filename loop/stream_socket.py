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


async def connect_unix(path: str) -> socket.socket:
    """Connect to the unix socket at `path`: close-on-exec and tuned, as by `connect_tcp`.

    Context: a task. Suspends: while the server's queue is full. Raises: OSError.
    """
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        reason = f"a socket path has at most {UNIX_PATH_BYTES_MAX} bytes"
        raise OSError(errno.ENAMETOOLONG, reason)
    return await _connect(socket.AF_UNIX, socket.SOCK_STREAM, 0, path)


async def connect_tcp(host: str, port: int) -> socket.socket:
    """Connect to `port` of `host`, a name or an address of IPv4 or IPv6.

    Context: a task. Suspends: until a connection is made, or none could be.
    Raises: OSError, that of the last address that was tried.
    """
    last: OSError | None = None
    for family, kind, protocol, address in await _addresses(host, port):
        try:
            return await _connect(family, kind, protocol, address)
        except OSError as error:
            last = error
    raise last or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


async def _addresses(host: str, port: int) -> list[tuple[int, int, int, Any]]:
    def look_up() -> list[tuple[int, int, int, Any]]:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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
