# SPDX-License-Identifier: Apache-2.0
"""The drained section: the one way to make a part of the graph quiet.

Inside one, for the node and everything above it: no new request arrives, none is in flight, client
sockets of the context are silent, and no request that took a short cut through a direct map is
under way. Graph changes, context moves, job completion and resizes happen inside.

The order matters. First the doors close, from the outside in: external fds, then block backends
(their new requests queue up), then the direct maps. Then the wait: for maps, then for nodes from
the top down, since a node's requests are what its children's requests come from. Sections nest and
overlap; the last one to end opens the doors again, in the opposite order.

A coroutine that is itself a request on the node must not open a section on it: it would wait for
itself.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from blockemu.drivers.node import ancestors

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.direct_map import DirectMap
    from blockemu.drivers.node import BlockDriverState
    from blockemu.loop.aio_context import AioContext


class DrainedSection:
    """`async with DrainedSection(node):` or `begin` and `end`. Home thread of the node's context.

    Between `begin` and `end` the node may change its context; `end` then runs in the new one and
    `leave_context` must have been called in the old one.
    """

    def __init__(self, node: BlockDriverState) -> None:
        self._nodes = ancestors(node)
        self._ctx: AioContext | None = None
        self._backends: list[BlockBackend] = []
        self._maps: list[DirectMap] = []

    async def __aenter__(self) -> DrainedSection:
        await self.begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave_context()
        self.end()

    async def begin(self) -> None:
        """Close the doors and wait until it is quiet.

        Suspends: until in-flight requests end. Cancelled meanwhile, it opens the doors again.
        """
        ctx = self._nodes[0].ctx
        assert ctx.is_home()
        ctx.disable_external()
        self._ctx = ctx
        for node in self._nodes:
            for edge in node.parents:
                if edge.parent is None:
                    self._backends.append(edge.owner)  # type: ignore[arg-type]
            self._maps.extend(node.mapped_by)
            own = node.driver.direct_map()
            if own is not None:
                self._maps.append(own)
        for backend in self._backends:
            backend.drained_begin()
        for node in self._nodes:
            node.drained_by.append(self)
        for direct_map in self._maps:
            direct_map.hold()
        try:
            for direct_map in self._maps:
                await direct_map.wait_idle()
            for node in reversed(self._nodes):
                await node.wait_idle()
        except BaseException:
            self.leave_context()
            self.end()
            raise

    def take_in(self, backend: BlockBackend) -> None:
        """`backend` has just come to hold a node of this section: its door is closed as well."""
        self._backends.append(backend)
        backend.drained_begin()

    def let_go(self, backend: BlockBackend) -> None:
        """`backend` holds no node of this section any more."""
        if backend in self._backends:
            self._backends.remove(backend)

    def leave_context(self) -> None:
        """Let the external fds of the context in which the section began speak again."""
        assert self._ctx is not None
        self._ctx.enable_external()
        self._ctx = None

    def end(self) -> None:
        """Open the doors: waiting requests go on, in the node's present context."""
        for direct_map in self._maps:
            direct_map.release()
        self._maps.clear()
        for node in self._nodes:
            node.drained_by.remove(self)
        for backend in self._backends:
            backend.drained_end()
        self._backends.clear()
