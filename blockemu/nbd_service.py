# SPDX-License-Identifier: Apache-2.0
"""The NBD server as a service that can be stopped and started again: its listeners, its limits.

Context: main and the iohandler context have one thread, in which all of this runs; what waits for
clients does so in the iohandler context, where the server lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from blockemu.listeners import Listener, open_listeners
from blockemu.loop.coroutine import run_in_context
from blockemu.nbd.server import NbdServer

if TYPE_CHECKING:
    from blockemu.addresses import Address
    from blockemu.exports import Export, ExportTable
    from blockemu.limits import Limits
    from blockemu.loop.aio_context import AioContext
    from blockemu.nbd.tls import TlsPolicy


class NbdService:
    """One server at a time."""

    def __init__(self, ctx: AioContext, exports: ExportTable) -> None:
        """`ctx`: the iohandler context."""
        self._ctx = ctx
        self._exports = exports
        self._server: NbdServer | None = None
        self.listeners: list[Listener] = []

    @property
    def is_running(self) -> bool:
        """Whether clients can connect."""
        return self._server is not None

    def start(
        self,
        addresses: Sequence[Address],
        limits: Limits,
        *,
        listing: str = "all",
        tls: TlsPolicy | None = None,
        on_last_gone: Callable[[], None] | None = None,
    ) -> None:
        """Listen, and serve whoever connects. `listing`: one of config.LISTINGS.
        `tls`: None is without.
        `on_last_gone`: see NbdServer.end_with_last_client.

        Raises: DaemonError; nobody listens then.
        """
        assert self._server is None
        self.listeners = open_listeners(addresses, tls=tls is not None)
        self._server = NbdServer(self._ctx, self._exports, limits=limits, tls=tls)
        if on_last_gone is not None:
            self._server.end_with_last_client(on_last_gone)
        for listener in self.listeners:
            lists = listing == "all" or (listing == "local" and listener.is_local)
            for sock in listener.sockets:
                self._server.listen(sock, lists=lists)

    async def stop(self) -> None:
        """Accept nobody any more; answer what is in flight; disconnect all. Suspends: until then;
        a client that doesn't take its replies can hold it up for `close_linger_ns`."""
        server, self._server = self._server, None
        if server is None:
            return
        await run_in_context(self._ctx, server.close)
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    async def disconnect(self, export: Export) -> None:
        """End the connections of an export that is being removed. Suspends: until they are gone."""
        server = self._server
        if server is not None and export.clients:
            await run_in_context(self._ctx, lambda: server.disconnect(export))

    async def left_by_all(self, export: Export) -> None:
        """Wait for an export's clients to leave by themselves. Suspends: until then."""
        server = self._server
        if server is not None and export.clients:
            await run_in_context(self._ctx, lambda: server.left_by_all(export))
