# SPDX-License-Identifier: Apache-2.0
"""The life of exports: made on a node, removed while clients are connected, closed at the end.

Three ways to remove one, all of which let nobody in any more and free its name at once:

- *safe*: only if it has no client; otherwise nothing happens.
- *soft*: its clients stay until they leave by themselves, and it is gone with the last.
- *hard*: what its clients have in flight is answered, then they are disconnected.

A removal ends in the background; `on_deleted` tells when. Clients of other exports, of the same
node too, don't notice: what ends is this export's own backend.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import Permission
from blockemu.drivers.errors import ImageError
from blockemu.errors import DaemonError
from blockemu.export_traits import has_one_cache, is_rotational
from blockemu.exports import Export, ExportSpec, ExportTable
from blockemu.loop.coroutine import run_in_context
from blockemu.loop.sync import WaitQueue
from blockemu.nbd import export_contexts

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.loop.aio_context import AioContext

log = logging.getLogger(__name__)


class RemoveMode(enum.Enum):
    """What becomes of the clients of an export that is removed."""

    SAFE = "safe"
    SOFT = "soft"
    HARD = "hard"


class ExportInUse(DaemonError):
    """A removal that is safe only without clients, and there are some."""


class ExportControl:
    """Makes and removes exports. Context: main, for everything."""

    def __init__(
        self,
        ctx: AioContext,
        exports: ExportTable,
        *,
        disconnect: Callable[[Export], Awaitable[None]],
        left_by_all: Callable[[Export], Awaitable[None]],
        on_deleted: Callable[[str], None] = lambda id: None,
    ) -> None:
        """`disconnect` ends an export's clients, `left_by_all` waits for them; `on_deleted` is
        told the id of an export of which nothing is left."""
        self._ctx = ctx
        self._exports = exports
        self._disconnect = disconnect
        self._left_by_all = left_by_all
        self._on_deleted = on_deleted
        self._gone = WaitQueue()

    async def add(self, node: BlockDriverState, spec: ExportSpec) -> Export:
        """Offer `node` as `spec` says.

        Suspends: until the backend stands, in the node's context.
        Raises: ImageError, when the node or its other users don't allow it; DaemonError, when the
        name or the id is taken.
        """
        if spec.writable and node.read_only:
            raise ImageError(node.filename or node.node_name, "is read-only: export it so")
        traits = has_one_cache(node), self._rotational(node, spec)

        async def make() -> Export:
            backend = BlockBackend(
                spec.name,
                node,
                writable=spec.writable,
                shared=Permission.ALL,
                write_through=spec.write_through,
            )
            export = Export(
                spec.name,
                backend,
                id=spec.id,
                read_only=not spec.writable,
                description=spec.description,
                multi_conn=traits[0] and spec.multi_conn,
                hidden=spec.hidden,
                connections_max=spec.connections_max,
                rotational=traits[1],
                resizable=spec.resizable,
            )
            try:
                await export_contexts.offer(
                    export, bitmaps=spec.bitmaps, allocation_depth=spec.allocation_depth
                )
            except BaseException:
                await backend.close()
                raise
            return export

        export = await run_in_context(node.ctx, make)
        try:
            self._exports.add(export)
        except ValueError as error:
            await self._close(export)
            raise DaemonError("exports", str(error)) from error
        return export

    def _rotational(self, node: BlockDriverState, spec: ExportSpec) -> bool:
        return is_rotational(node) if spec.rotational is None else spec.rotational

    def remove(self, export: Export, mode: RemoveMode) -> None:
        """Begin to remove `export`. Raises: ExportInUse."""
        if mode is RemoveMode.SAFE and export.clients:
            raise ExportInUse(f"export '{export.id}'", "still in use")
        if not export.shutting_down:
            self._exports.begin_to_remove(export)
            self._ctx.spawn(self._delete(export, mode), name="export removal")
        elif mode is RemoveMode.HARD:
            # Somebody lost patience with a soft one, which then ends by itself.
            self._ctx.spawn(self._hurry(export), name="export removal")

    async def close_all(self) -> None:
        """Remove all exports the hard way. Suspends: until nothing is left of them."""
        for export in self._exports.with_leaving():
            self.remove(export, RemoveMode.HARD)
        while self._exports.with_leaving():
            await self._gone.wait()

    async def _close(self, export: Export) -> None:
        """Let go of the node, in its context. Raises: OSError, when the last flush fails."""

        async def close() -> None:
            export_contexts.withdraw(export)
            await export.backend.close()

        await run_in_context(export.backend.ctx, close)

    async def _hurry(self, export: Export) -> None:
        await self._disconnect(export)

    async def _delete(self, export: Export, mode: RemoveMode) -> None:
        if mode is RemoveMode.HARD:
            await self._disconnect(export)
        else:
            await self._left_by_all(export)
        try:
            await self._close(export)
        except OSError as error:
            log.error("export '%s': the last flush failed: %s", export.name, error.strerror)
        self._exports.forget(export)
        self._gone.wake_all()
        self._on_deleted(export.id)
