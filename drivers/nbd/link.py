# SPDX-License-Identifier: Apache-2.0
"""The way to an export: one connection, or several, each replaced when it is lost.

A server may be restarted, and a network may fail. When a connection is lost, a task tries to make a
new one, over and over with longer and longer pauses. While there is none at all, requests wait for
one until `reconnect-delay` from the loss on is over, and those that were in flight are made again;
after it, all fail with EIO, until a connection is there again.

Several connections (`multi-conn`) are only for a server that says that a flush on one covers what
was written through all (NBD_FLAG_CAN_MULTI_CONN). Each request goes where the fewest are under way.
The first connection is enough to begin with; the others are made in the background. When one of
several is lost, the others go on. What was in flight on it is made again elsewhere, if it changes
nothing, or was never sent, or requests may wait; other writes fail without a delay as they would
with one connection: the server may still be about to carry them out, and might do so after a newer
write to the same place.

That the server has lost nothing meanwhile is for who sets a delay to know: writes that it had
acknowledged and not yet flushed aren't sent again. An export that came back smaller, or that may no
longer be written, or can do less (connector.py) isn't the same any more, and is given up, as is a
server that breaks the rules of the protocol. One that has grown is taken as it is now; connections
on which the old size was agreed on are replaced.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.nbd.client_connection import ClientConnection, ConnectionLost
from blockemu.drivers.nbd.client_handshake import ExportFacts, RefusedError
from blockemu.drivers.nbd.connector import Connected, Connector, check_same, reason_of
from blockemu.drivers.nbd.negotiation_stream import NegotiationError
from blockemu.drivers.nbd.protocol import Command
from blockemu.loop.coroutine import settled
from blockemu.loop.sync import WaitQueue, sleep_ns

if TYPE_CHECKING:
    from blockemu.drivers.nbd.replies import InFlight
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.coroutine import Task

FIRST_PAUSE_NS: Final = 100_000_000
LAST_PAUSE_NS: Final = 16_000_000_000
"""Between attempts: doubled from the first to the last."""

log = logging.getLogger(__name__)

_REPEATABLE: Final = (
    Command.NBD_CMD_READ, Command.NBD_CMD_FLUSH, Command.NBD_CMD_BLOCK_STATUS,
    Command.NBD_CMD_CACHE,
)  # fmt: skip
"""Made twice, or late, they are as good as once."""


class NbdLink:
    """Context: home thread of the node's context, which changes by `detach` and `attach`."""

    def __init__(
        self,
        name: str,
        connector: Connector,
        ctx: AioContext,
        *,
        reconnect_delay_ns: int,
        connections_max: int,
        writable: bool,
    ) -> None:
        self.name = name
        self._connector = connector
        self._ctx = ctx
        self._reconnect_delay_ns = reconnect_delay_ns
        self._connections_max = connections_max
        self._writable = writable
        self._live: list[ClientConnection] = []
        self._retired: list[ClientConnection] = []
        self._facts: ExportFacts | None = None
        self._given_up: str | None = None
        self._lost_why = ""
        self._failed_why = ""
        """The last attempt since then."""
        self._waiting_ends_ns = 0
        self._trying: Task[None] | None = None
        self._changed = WaitQueue()

    @property
    def facts(self) -> ExportFacts:
        """Of the export: as it was when it was opened, but for its length, which may grow."""
        assert self._facts is not None
        return self._facts

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._live)

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
                break
            except (OSError, NegotiationError) as error:
                left_ns = deadline_ns - self._ctx.now_ns()
                if left_ns <= 0 or _is_final(error):
                    raise ImageError(self.name, reason_of(error)) from error
            await sleep_ns(min(pause_ns, left_ns))
            pause_ns = min(pause_ns * 2, LAST_PAUSE_NS)
        self._try_for_more()

    async def _attempt(self) -> Connected:
        """Raises: OSError, NegotiationError."""
        connected = await self._connector.attempt()
        try:
            if self._writable and connected.facts.read_only:
                raise RefusedError("the server lets nobody write to this export: open it read-only")
            if self._facts is not None:
                check_same(self._facts, connected.facts)
        except RefusedError:
            connected.sock.close()
            raise
        return connected

    def _adopt(self, connected: Connected) -> None:
        facts = connected.facts
        if self._facts is None:
            self._facts = facts
        elif self._facts.length != facts.length:
            log.warning(
                "%s: has %d bytes now, and had %d", self.name, facts.length, self._facts.length
            )
            self._facts = dataclasses.replace(self._facts, length=facts.length)
            self._retire_all()
        if not facts.multi_conn:
            self._retire_all()
        connection = ClientConnection(connected.sock, facts, name=self.name, on_lost=self._on_lost)
        self._live.append(connection)
        connection.attach(self._ctx)

    def _retire_all(self) -> None:
        """These connections finish what they have, and get no more."""
        for connection in self._live:
            connection.close_when_idle()
        self._retired = [it for it in (*self._retired, *self._live) if it.load]
        self._live.clear()

    # --- requests ---

    async def request(
        self,
        command: Command,
        flags: int,
        offset: int,
        length: int,
        view: memoryview | None = None,
    ) -> InFlight:
        """Make a request; again, if the connection is lost and that is right (see above).

        Suspends: until it is answered. Raises: OSError, the server's, or EIO.
        """
        while True:
            live = self._live
            if len(live) == 1:
                connection = live[0]
            else:
                connection = self._least_loaded() or await self._next_connection()
            try:
                return await connection.request(
                    command, flags, offset=offset, length=length, view=view
                )
            except ConnectionLost as lost:
                if lost.final:
                    raise
                if not self._reconnect_delay_ns and not self._may_go_elsewhere(lost, command):
                    raise

    def _least_loaded(self) -> ClientConnection | None:
        return min(self._live, key=_load) if self._live else None

    def _may_go_elsewhere(self, lost: ConnectionLost, command: Command) -> bool:
        return bool(self._live) and (command in _REPEATABLE or lost.unsent)

    async def _next_connection(self) -> ClientConnection:
        while not self._live:
            if self._given_up is not None:
                raise io_error(errno.EIO, f"{self.name}: {self._given_up}")
            self._try_for_more()
            if self._ctx.now_ns() >= self._waiting_ends_ns:
                why = f": {self._failed_why}" if self._failed_why else ""
                reason = f"{self._lost_why}, and no new connection{why}"
                raise io_error(errno.EIO, f"{self.name}: {reason}")
            timer = self._ctx.new_timer(self._changed.wake_all)
            timer.arm(self._waiting_ends_ns)
            try:
                await self._changed.wait()
            finally:
                timer.cancel()
        return self._live[0]

    # --- the next times ---

    def _on_lost(self, connection: ClientConnection, lost: ConnectionLost) -> None:
        if connection in self._live:
            self._live.remove(connection)
        # Where nothing waits for the next connection, what fails says it.
        waited_for = bool(self._reconnect_delay_ns or self._live) and not lost.final
        log.log(logging.WARNING if waited_for else logging.INFO, "%s", lost.reason)
        why = lost.reason.removeprefix(f"{self.name}: ")
        if lost.final:
            self.give_up(why)
            return
        if not self._live:
            self._lost_why, self._failed_why = why, ""
            self._waiting_ends_ns = self._ctx.now_ns() + self._reconnect_delay_ns
        self._try_for_more()
        self._changed.wake_all()

    def _wanted(self) -> int:
        if self._given_up is not None:
            return 0
        return self._connections_max if self.facts.multi_conn else 1

    def _try_for_more(self) -> None:
        """See that a task is at it, if connections are missing."""
        if self._trying is None and len(self._live) < self._wanted():
            self._trying = self._ctx.spawn(self._keep_trying(), name="nbd-reconnect")
            if self._trying.done():
                self._trying = None

    async def _keep_trying(self) -> None:
        pause_ns = FIRST_PAUSE_NS
        if not self._live:  # the last one was lost just now: its server may need a moment
            await sleep_ns(pause_ns)
        while len(self._live) < self._wanted():
            try:
                connected = await self._attempt()
            except (OSError, NegotiationError) as error:
                self._failed_why = reason_of(error)
                if _is_final(error):
                    if not self._live:
                        self._given_up = f"{self._lost_why}; then: {error}"
                    log.warning("%s: no more connections: %s", self.name, error)
                    break
                log.info("%s: no new connection yet: %s", self.name, reason_of(error))
                await sleep_ns(pause_ns)
                pause_ns = min(pause_ns * 2, LAST_PAUSE_NS)
                continue
            if not self._is_of_use(connected):
                connected.sock.close()
                break
            if not self._live:
                log.warning("%s: connected again", self.name)
            self._adopt(connected)
            pause_ns = FIRST_PAUSE_NS
            self._changed.wake_all()
        self._trying = None
        self._changed.wake_all()

    def _is_of_use(self, connected: Connected) -> bool:
        """Whether it is still wanted, and may stand beside those that there are."""
        if len(self._live) >= self._wanted():
            return False
        return not self._live or connected.facts.multi_conn

    async def look_again(self) -> None:
        """Ask the server anew what it has, on a connection that replaces the others.

        Suspends: for the server. Raises: OSError.
        """
        try:
            connected = await self._attempt()
        except (OSError, NegotiationError) as error:
            raise io_error(errno.EIO, f"{self.name}: {reason_of(error)}") from error
        self._retire_all()
        self._adopt(connected)
        self._try_for_more()
        self._changed.wake_all()

    def give_up(self, reason: str) -> None:
        """Fail what is in flight and what waits, and all that comes."""
        if self._given_up is None:
            self._given_up = reason
        for connection in [*self._live, *self._retired]:
            connection.drop(reason, final=True)
        self._changed.wake_all()

    # --- moves and the end ---

    def detach(self) -> None:
        """The node is quiet, and leaves its context. A search for a connection ends with that."""
        if self._trying is not None:
            self._trying.cancel()
            self._trying = None
        for connection in self._live:
            connection.detach()

    def attach(self, ctx: AioContext) -> None:
        """The node belongs to `ctx` now."""
        self._ctx = ctx
        for connection in self._live:
            connection.attach(ctx)
        self._try_for_more()

    async def close(self) -> None:
        """Say good-bye, if somebody is there. Suspends: until an attempt under way has ended."""
        if self._given_up is None:
            self._given_up = "closed"
        task, self._trying = self._trying, None
        if task is not None:
            task.cancel()
            await settled(task)
        for connection in self._live:
            connection.close()
        self._live.clear()


def _is_final(error: OSError | NegotiationError) -> bool:
    """Whether trying again is in vain."""
    return isinstance(error, RefusedError) and not error.may_pass


def _load(connection: ClientConnection) -> int:
    return connection.load
