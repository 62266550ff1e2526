# SPDX-License-Identifier: Apache-2.0
"""Memory for requests' data, which all connections of a server share.

Each connection has a little for itself, which is never in question (`memory_reserve_bytes`), so a
client with small requests goes on whatever others do. What it needs beyond that it asks for here,
once, and keeps: the data path counts its own bytes and asks nobody. Only when somebody waits is
that different. Those who wait are served in their order, large requests and small ones alike; all
who were granted more than their reserve are asked to give back what isn't in use, as their
requests end. So the sum is bounded, a client can't take what another is waiting for, and nothing is
paid for it while there is enough.

A client that holds memory and doesn't move is dropped after `unread_time_max_ns`: one that leaves
its replies unread in any case, one that has sent half a payload when others wait.

Context: the server's. Connections live in others: they call `ask` and `give_back` from their home
threads, and are called there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.limits import Limits
    from blockemu.loop.aio_context import AioContext
    from blockemu.nbd.connection import BaseConnection

log = logging.getLogger(__name__)


class MemoryBudget:
    """The shared bytes, who has them, and who waits."""

    def __init__(self, ctx: AioContext, limits: Limits) -> None:
        self._ctx = ctx
        self._limits = limits
        self.free_bytes = limits.memory_bytes_max
        self._leases: dict[BaseConnection, int] = {}
        """Beyond the reserve."""
        self._waiting: dict[BaseConnection, int] = {}
        """What its data needs in all; in the order in which they came."""
        self._told: set[BaseConnection] = set()
        """Those who know that somebody waits."""

    @property
    def waiting_count(self) -> int:
        """Connections that wait for memory."""
        return len(self._waiting)

    # --- from connections; their home threads ---

    def ask(self, connection: BaseConnection, wanted_bytes: int) -> None:
        """Have `connection.allow` called when its data may take `wanted_bytes` in all. It may turn
        out to be less, if it has given something back meanwhile: then it asks again."""
        self._ctx.schedule_oneshot(lambda: self._asked(connection, wanted_bytes))

    def give_back(self, connection: BaseConnection, spare_bytes: int) -> None:
        """The data of `connection` takes so many bytes less from now on."""
        self._ctx.schedule_oneshot(lambda: self._given_back(connection, spare_bytes))

    # --- the server's context ---

    def forget(self, connection: BaseConnection) -> None:
        """Nothing is left of it."""
        self._waiting.pop(connection, None)
        self._told.discard(connection)
        self.free_bytes += self._leases.pop(connection, 0)
        self._serve()

    def _asked(self, connection: BaseConnection, wanted_bytes: int) -> None:
        if connection.wants_answers:
            self._waiting[connection] = wanted_bytes
            self._serve()

    def _given_back(self, connection: BaseConnection, spare_bytes: int) -> None:
        had = self._leases.get(connection)
        if had is not None:  # else it is forgotten, and all it had is free
            assert spare_bytes <= had, (spare_bytes, had)
            self._lease(connection, had - spare_bytes)
            self._serve()

    def _serve(self) -> None:
        """Grant what there is to those who wait, in their order."""
        while self._waiting:
            connection, wanted_bytes = next(iter(self._waiting.items()))
            had = self._leases.get(connection, 0)
            more = max(0, wanted_bytes - self._limits.memory_reserve_bytes - had)
            if more > self.free_bytes:
                break
            del self._waiting[connection]
            self._grant(connection, had, more)
        self._tell_all()

    def _grant(self, connection: BaseConnection, had: int, more: int) -> None:
        """While there is plenty, all that a connection may ever ask for: it needn't ask again."""
        limits = self._limits
        rest = limits.in_flight_bytes_max - limits.memory_reserve_bytes - had
        plenty = self.free_bytes - rest >= limits.memory_bytes_max // 2
        if plenty and not self._waiting:
            more = max(more, rest)
        self._lease(connection, had + more)
        connection.ctx.schedule_oneshot(lambda: connection.allow(more))

    def _lease(self, connection: BaseConnection, lease: int) -> None:
        self.free_bytes += self._leases.pop(connection, 0) - lease
        if lease:
            self._leases[connection] = lease
        assert 0 <= self.free_bytes <= self._limits.memory_bytes_max

    def _tell_all(self) -> None:
        """Tell those who have some whether others wait, if they don't know."""
        wanted = bool(self._waiting)
        others = set(self._leases) - self._told if wanted else self._told
        for connection in others:
            self._tell(connection, wanted=wanted)
        self._told = self._told | others if wanted else set()

    def _tell(self, connection: BaseConnection, *, wanted: bool) -> None:
        connection.ctx.schedule_oneshot(lambda: connection.reclaim(wanted=wanted))
