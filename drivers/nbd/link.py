# SPDX-License-Identifier: Apache-2.0
"""The way to an export: one connection after the other.

A server may be restarted, and a network may fail. When a connection is lost, a task tries to make a
new one, over and over with longer and longer pauses. For `reconnect-delay` from the loss on,
requests wait for that, and those that were in flight are made again; after it, all fail with EIO,
until a connection is there again.

That the server has lost nothing meanwhile is for who sets a delay to know: writes that it had
acknowledged and not yet flushed aren't sent again. An export that came back with another size, or
that may no longer be written, isn't the same any more, and is given up, as is a server that breaks
the rules of the protocol.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.nbd.client_connection import ClientConnection, ConnectionLost
from blockemu.drivers.nbd.client_handshake import (
    NEGOTIATION_BYTES_MAX,
    ExportFacts,
    RefusedError,
    negotiate,
)
from blockemu.drivers.nbd.negotiation_stream import NegotiationError, NegotiationStream
from blockemu.loop.coroutine import Cancelled, settled
from blockemu.loop.stream_socket import PlainSocket, connect_tcp, connect_unix
from blockemu.loop.sync import WaitQueue, sleep_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from blockemu.drivers.nbd.address import NbdAddress
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.coroutine import Task

ATTEMPT_NS: Final = 30_000_000_000
"""For one attempt to connect and negotiate. A server that answers at all does so sooner."""

FIRST_PAUSE_NS: Final = 100_000_000
LAST_PAUSE_NS: Final = 16_000_000_000
"""Between attempts: doubled from the first to the last."""

log = logging.getLogger(__name__)


class NbdLink:
    """Context: home thread of the node's context, which changes by `detach` and `attach`."""

    def __init__(
        self, address: NbdAddress, ctx: AioContext, *, reconnect_delay_ns: int, writable: bool
    ) -> None:
        self.name = address.uri
        self._address = address
        self._ctx = ctx
        self._reconnect_delay_ns = reconnect_delay_ns
        self._writable = writable
        self._connection: ClientConnection | None = None
        self._facts: ExportFacts | None = None
        self._given_up: str | None = None
        self._lost_why = ""
        self._waiting_ends_ns = 0
        self._reconnecting: Task[None] | None = None
        self._changed = WaitQueue()

    @property
    def facts(self) -> ExportFacts:
        """Of the export, as it was when it was opened."""
        assert self._facts is not None
        return self._facts

    # --- the first time ---

    async def open(self, *, timeout_ns: int) -> None:
        """Connect; if that fails, again and again until `timeout_ns` are over.

        Suspends: for the server. Raises: ImageError.
        """
        deadline_ns = self._ctx.now_ns() + timeout_ns
        pause_ns = FIRST_PAUSE_NS
        while True:
            try:
                self._adopt(await self._attempt())
                return
            except (OSError, NegotiationError) as error:
                left_ns = deadline_ns - self._ctx.now_ns()
                if left_ns <= 0 or isinstance(error, RefusedError):
                    raise ImageError(self.name, _reason(error)) from error
            await sleep_ns(min(pause_ns, left_ns))
            pause_ns = min(pause_ns * 2, LAST_PAUSE_NS)

    async def _attempt(self) -> ClientConnection:
        """One new connection, within ATTEMPT_NS. Raises: OSError, NegotiationError."""
        task = self._ctx.spawn(self._connect(), name="nbd-connect")
        timed_out = False

        def expire() -> None:
            nonlocal timed_out
            timed_out = True
            task.cancel()

        timer = self._ctx.new_timer(expire)
        timer.arm(self._ctx.now_ns() + ATTEMPT_NS)
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

    async def _connect(self) -> ClientConnection:
        sock = await self._connect_socket()
        try:
            stream = NegotiationStream(
                sock, self._ctx, bytes_max=NEGOTIATION_BYTES_MAX, peer="the server", external=False,
                wants_tls=self._address.tls,
            )  # fmt: skip
            facts = await negotiate(stream, self._address.export)
            self._check_same(facts)
        except BaseException:
            sock.close()
            raise
        return ClientConnection(stream.transport, facts, name=self.name, on_lost=self._on_lost)

    async def _connect_socket(self) -> PlainSocket:
        try:
            if self._address.path is not None:
                return await connect_unix(self._address.path)
            return await connect_tcp(self._address.host, self._address.port)
        except OSError as error:
            said = error.strerror or os.strerror(error.errno or errno.EIO)
            reason = f"connecting to {self._address.server} failed: {said}"
            raise OSError(error.errno, reason) from error

    def _check_same(self, facts: ExportFacts) -> None:
        """Refuse an export that isn't what it was. Raises: RefusedError."""
        if self._writable and facts.read_only:
            raise RefusedError("the server lets nobody write to this export: open it read-only")
        before = self._facts
        if before is None:
            return
        if facts.length != before.length:
            raise RefusedError(f"the export has {facts.length} bytes now, and had {before.length}")
        if facts.block_min > before.block_min or facts.payload_max < before.payload_max:
            raise RefusedError("the server's block sizes are others than before")

    def _adopt(self, connection: ClientConnection) -> None:
        if self._facts is None:
            self._facts = connection.facts
        self._connection = connection
        connection.attach(self._ctx)

    # --- requests ---

    async def run(self, make: Callable[[ClientConnection], Coroutine[Any, Any, Any]]) -> Any:
        """Have `make` make a request, and return what it returns; again, if the connection is lost
        and requests are to wait for the next.

        Suspends: until it is answered. Raises: OSError, the server's, or EIO.
        """
        while True:
            connection = self._connection or await self._next_connection()
            try:
                return await make(connection)
            except ConnectionLost as lost:
                if lost.final or not self._reconnect_delay_ns:
                    raise

    async def _next_connection(self) -> ClientConnection:
        while self._connection is None:
            if self._given_up is not None:
                raise io_error(errno.EIO, f"{self.name}: {self._given_up}")
            self._reconnect()
            if self._ctx.now_ns() >= self._waiting_ends_ns:
                raise io_error(errno.EIO, f"{self.name}: {self._lost_why}, and no new connection")
            timer = self._ctx.new_timer(self._changed.wake_all)
            timer.arm(self._waiting_ends_ns)
            try:
                await self._changed.wait()
            finally:
                timer.cancel()
        return self._connection

    # --- the next times ---

    def _on_lost(self, lost: ConnectionLost) -> None:
        # Where nothing waits for the next connection, what fails says it.
        waited_for = bool(self._reconnect_delay_ns) and not lost.final
        log.log(logging.WARNING if waited_for else logging.INFO, "%s", lost.reason)
        self._connection = None
        self._lost_why = lost.reason.removeprefix(f"{self.name}: ")
        self._waiting_ends_ns = self._ctx.now_ns() + self._reconnect_delay_ns
        if lost.final:
            self._given_up = self._lost_why
        else:
            self._reconnect()
        self._changed.wake_all()

    def _reconnect(self) -> None:
        """See that a task is at it."""
        if self._reconnecting is None:
            self._reconnecting = self._ctx.spawn(self._keep_trying(), name="nbd-reconnect")
            if self._reconnecting.done():
                self._reconnecting = None

    async def _keep_trying(self) -> None:
        pause_ns = FIRST_PAUSE_NS
        while not self._is_given_up():
            await sleep_ns(pause_ns)
            pause_ns = min(pause_ns * 2, LAST_PAUSE_NS)
            try:
                connection = await self._attempt()
            except RefusedError as error:
                self._given_up = f"{self._lost_why}; then: {error}"
                break
            except (OSError, NegotiationError) as error:
                log.info("%s: no new connection yet: %s", self.name, _reason(error))
                continue
            if self._is_given_up():
                connection.close()
                break
            log.warning("%s: connected again", self.name)
            self._adopt(connection)
            break
        self._reconnecting = None
        self._changed.wake_all()

    def _is_given_up(self) -> bool:
        return self._given_up is not None

    def give_up(self, reason: str) -> None:
        """Fail what is in flight and what waits, and all that comes."""
        self._given_up = reason
        if self._connection is not None:
            self._connection.drop(reason, final=True)
        self._changed.wake_all()

    # --- moves and the end ---

    def detach(self) -> None:
        """The node is quiet, and leaves its context. A search for a connection ends with that; the
        next request begins another."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            self._reconnecting = None
        if self._connection is not None:
            self._connection.detach()

    def attach(self, ctx: AioContext) -> None:
        """The node belongs to `ctx` now."""
        self._ctx = ctx
        if self._connection is not None:
            self._connection.attach(ctx)

    async def close(self) -> None:
        """Say good-bye, if somebody is there. Suspends: until an attempt under way has ended."""
        task, self._reconnecting = self._reconnecting, None
        if task is not None:
            task.cancel()
            await settled(task)
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _close_result(task: Task[ClientConnection]) -> None:
    """Close a connection that was made in the moment in which nobody wanted it any more."""
    if task.exception() is None:
        task.result().close()


def _reason(error: OSError | NegotiationError) -> str:
    if isinstance(error, NegotiationError):
        return str(error)
    return error.strerror or os.strerror(error.errno or errno.EIO)
