# SPDX-License-Identifier: Apache-2.0
"""A peer's socket as negotiation needs it: exact reads, whole writes, and a bound on both.

Negotiation is rare and short, so it is written as a coroutine that waits where it must. It reads
exactly the bytes that it was promised and never ahead: whatever follows belongs to the next phase
(transmission, TLS), which reads the socket itself. So nothing that came before TLS can be taken for
something that came through it.

A peer may take its time or flood us. Both end in `NegotiationError`: by `abort`, which whoever
watches the clock calls, and by a bound on the bytes taken from it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blockemu.loop.coroutine import Future
from blockemu.loop.socket_options import has_input

if TYPE_CHECKING:
    from blockemu.drivers.nbd.client_tls import ClientTls
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.stream_socket import PlainSocket, StreamSocket
    from blockemu.loop.tls_stream import TlsStream

DISCARD_CHUNK_BYTES = 16 * 1024


class NegotiationError(Exception):
    """Negotiation can't go on: close the connection. `str()` is the reason, for the log."""


class NegotiationStream:
    """Context: home thread of `ctx`. One coroutine uses it at a time."""

    def __init__(
        self,
        sock: PlainSocket,
        ctx: AioContext,
        *,
        bytes_max: int,
        peer: str = "client",
        external: bool = True,
        wants_tls: ClientTls | None = None,
    ) -> None:
        """`sock` is connected and non-blocking; it stays the caller's.

        `peer` is what messages call the other side. `external`: its handlers are (see
        `AioContext.set_fd_handler`), since the peer is one that makes requests.
        """
        self.wants_tls = wants_tls
        """A client's wish, for who negotiates."""
        self.tls: TlsStream | None = None
        """What all goes through, once it was agreed on."""
        self.socket = sock
        self._sock: StreamSocket = sock
        self._peer = peer
        self._external = external
        self._ctx = ctx
        self._bytes_left = bytes_max
        self._ready: Future[None] | None = None
        self._aborted: str | None = None
        self._ending: str | None = None

    @property
    def transport(self) -> StreamSocket:
        """What the next phase uses: the socket, or the TLS on it."""
        return self._sock

    @property
    def secure(self) -> bool:
        """Whether TLS has been agreed on, so that all goes through it."""
        return self.tls is not None

    async def start_tls(self, tls: TlsStream) -> None:
        """Have the TLS handshake, and go on through `tls`, which was made of this socket.

        What the handshake takes counts as taken. Suspends: for the peer. Raises: NegotiationError,
        when it isn't one that we talk to.
        """
        assert self.tls is None
        received = 0
        while True:
            self._check()
            try:
                tls.handshake()
            except (BlockingIOError, InterruptedError):
                ready = False
            except OSError as error:
                raise NegotiationError(f"TLS: {error.strerror}") from error
            else:
                ready = True
            self._take(tls.raw_bytes_received - received)
            received = tls.raw_bytes_received
            if ready:
                break
            await self._wait(read=True, write=tls.unsent)
        self._sock = self.tls = tls

    def has_input(self) -> bool:
        """Whether something has arrived that nobody has read. For sockets without TLS."""
        assert self.tls is None
        return has_input(self.socket)

    def abort(self, reason: str) -> None:
        """Fail what the coroutine waits for, or its next call if it waits for something else."""
        self._aborted = reason
        self._wake()

    def end_at_rest(self, reason: str) -> None:
        """Fail the coroutine once the peer owes us nothing that it has begun: what it waits for, if
        that is so now (`receive` with `at_rest`), or else a later wait."""
        self._ending = reason
        self._wake()

    @property
    def ending(self) -> bool:
        """Whether the end is to come as soon as the peer is at rest."""
        return self._ending is not None

    def close(self) -> None:
        """Close the socket, with a farewell if there is TLS. For who has no further use for it."""
        self._sock.close()

    def lift_bound(self) -> None:
        """Negotiation is over, and who reads on has bounds of its own."""
        self._bytes_left = sys.maxsize

    async def receive(self, length: int, *, at_rest: bool = False) -> bytes:
        """Exactly `length` bytes. `at_rest`: something new begins with the first of them.

        Suspends: until they are there. Raises: NegotiationError.
        """
        self._check()
        self._take(length)
        received = bytearray()
        while len(received) < length:
            try:
                data = self._sock.recv(length - len(received))
            except (BlockingIOError, InterruptedError):
                if at_rest and not received and self._ending is not None:
                    raise NegotiationError(self._ending) from None
                await self._wait(read=True, write=self.tls is not None and self.tls.unsent)
                continue
            except OSError as error:
                raise NegotiationError(f"receive failed: {error.strerror}") from error
            if not data:
                raise NegotiationError(f"{self._peer} hung up")
            received += data
        return bytes(received)

    async def discard(self, length: int) -> None:
        """Drop `length` bytes, holding few of them. Suspends and raises as `receive`."""
        while length > 0:
            length -= len(await self.receive(min(length, DISCARD_CHUNK_BYTES)))

    async def send(self, data: bytes) -> None:
        """All of `data`. Suspends: until the kernel has it. Raises: NegotiationError."""
        self._check()
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except (BlockingIOError, InterruptedError):
                await self._wait(write=True)
            except OSError as error:
                raise NegotiationError(f"send failed: {error.strerror}") from error

    def _take(self, length: int) -> None:
        self._bytes_left -= length
        if self._bytes_left < 0:
            raise NegotiationError(f"{self._peer} sent too much before an export was chosen")

    async def _wait(self, *, read: bool = False, write: bool = False) -> None:
        self._check()
        self._ready = Future()
        fd = self._sock.fileno()
        self._ctx.set_fd_handler(
            fd,
            read=self._wake if read else None,
            write=self._wake if write else None,
            external=self._external,
        )
        try:
            await self._ready
        finally:
            self._ready = None
            self._ctx.set_fd_handler(fd)
        self._check()

    def _check(self) -> None:
        if self._aborted is not None:
            raise NegotiationError(self._aborted)

    def _wake(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
