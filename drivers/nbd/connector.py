# SPDX-License-Identifier: Apache-2.0
"""One attempt after the other to get from an address to an export: connect, negotiate, compare.

An attempt has a bound on its time. A server that answers is believed to have the export that it had
before only if nothing of it is less than before: a request that was made for what the server could
do then must not reach one that can't.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from blockemu.drivers.nbd.client_handshake import (
    NEGOTIATION_BYTES_MAX,
    ExportFacts,
    RefusedError,
    negotiate,
)
from blockemu.drivers.nbd.negotiation_stream import NegotiationError, NegotiationStream
from blockemu.drivers.nbd.protocol import TransmissionFlag
from blockemu.loop.coroutine import Cancelled, settled
from blockemu.loop.current import running_context
from blockemu.loop.stream_socket import (
    adopt_stream,
    connect_tcp,
    connect_unix,
    connect_vsock,
)

if TYPE_CHECKING:
    from blockemu.drivers.nbd.address import NbdAddress
    from blockemu.loop.coroutine import Task
    from blockemu.loop.stream_socket import PlainSocket, StreamSocket

ATTEMPT_NS: Final = 30_000_000_000
"""For one attempt to connect and negotiate. A server that answers at all does so sooner."""

_USED_FLAGS: Final = {
    TransmissionFlag.NBD_FLAG_SEND_FLUSH: "flush",
    TransmissionFlag.NBD_FLAG_SEND_FUA: "FUA",
    TransmissionFlag.NBD_FLAG_SEND_TRIM: "trim",
    TransmissionFlag.NBD_FLAG_SEND_WRITE_ZEROES: "write zeroes",
    TransmissionFlag.NBD_FLAG_SEND_FAST_ZERO: "fast zeroes",
    TransmissionFlag.NBD_FLAG_SEND_CACHE: "cache",
}


class Connected(NamedTuple):
    """A socket in the transmission phase, and what was agreed on."""

    sock: StreamSocket
    facts: ExportFacts


class Connector:
    """Context: a task's; the context may be another for every call."""

    def __init__(self, address: NbdAddress, *, meta_context: str) -> None:
        self._address = address
        self._meta_context = meta_context
        self._fd_is_used = False

    async def attempt(self) -> Connected:
        """One new connection, within ATTEMPT_NS. Raises: OSError, NegotiationError."""
        ctx = running_context()
        task = ctx.spawn(self._connect(), name="nbd-connect")
        timed_out = False

        def expire() -> None:
            nonlocal timed_out
            timed_out = True
            task.cancel()

        timer = ctx.new_timer(expire)
        timer.arm(ctx.now_ns() + ATTEMPT_NS)
        try:
            return await task
        except Cancelled:
            if timed_out:
                seconds = ATTEMPT_NS // 1_000_000_000
                raise NegotiationError(f"the server doesn't answer within {seconds} s") from None
            task.cancel()
            await settled(task)
            _close_result(task)
            raise
        finally:
            timer.cancel()

    async def _connect(self) -> Connected:
        sock = await self._connect_socket()
        try:
            stream = NegotiationStream(
                sock, running_context(), bytes_max=NEGOTIATION_BYTES_MAX, peer="the server",
                external=False, wants_tls=self._address.tls,
            )  # fmt: skip
            facts = await negotiate(stream, self._address.export, self._meta_context)
        except BaseException:
            sock.close()
            raise
        return Connected(stream.transport, facts)

    async def _connect_socket(self) -> PlainSocket:
        if self._address.fd is not None:
            if self._fd_is_used:
                reason = "the socket that was handed over is used up, and there is no other"
                raise RefusedError(reason)
            self._fd_is_used = True
        try:
            return await open_socket(self._address)
        except OSError as error:
            said = error.strerror or os.strerror(error.errno or errno.EIO)
            reason = f"connecting to {self._address.server} failed: {said}"
            raise OSError(error.errno, reason) from error


async def open_socket(address: NbdAddress) -> PlainSocket:
    """A connection to the server, on which nothing has been said. Suspends: until it is there.

    Raises: OSError.
    """
    if address.path is not None:
        return await connect_unix(address.path)
    if address.cid is not None:
        return await connect_vsock(address.cid, address.port)
    if address.fd is not None:
        return adopt_stream(address.fd)
    return await connect_tcp(
        address.host, address.port, ipv4=address.ipv4, ipv6=address.ipv6,
        keep_alive=address.keep_alive,
    )  # fmt: skip


def check_same(before: ExportFacts, now: ExportFacts) -> None:
    """Refuse an export that isn't what it was. It may have grown. Raises: RefusedError."""
    if now.length < before.length:
        raise RefusedError(f"the export has {now.length} bytes now, and had {before.length}")
    if now.block_min > before.block_min or now.payload_max < before.payload_max:
        raise RefusedError("the server's block sizes are others than before")
    for flag, what in _USED_FLAGS.items():
        if before.flags & flag and not now.flags & flag:
            raise RefusedError(f"the server has no {what} any more")
    if before.extended and not now.extended:
        raise RefusedError("the server has no extended headers any more")
    if before.context is not None and now.context is None:
        raise RefusedError("the server doesn't tell block status any more")


def reason_of(error: OSError | NegotiationError) -> str:
    """Why an attempt failed, for people."""
    if isinstance(error, NegotiationError):
        return str(error)
    return error.strerror or os.strerror(error.errno or errno.EIO)


def _close_result(task: Task[Connected]) -> None:
    """Close a connection that was made in the moment in which nobody wanted it any more."""
    if task.exception() is None:
        task.result().sock.close()
