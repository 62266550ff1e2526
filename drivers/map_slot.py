# SPDX-License-Identifier: Apache-2.0
"""Where a driver keeps its direct map: made when first asked for, dropped when it would be wrong.

A map lives in two places, the driver that fills it and the node of the host file that it points
into (`mapped_by`), which closes it before the file's descriptor goes. Both are seen to here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.drivers.direct_map import DirectMap
    from blockemu.drivers.node import BlockDriverState


class MapSlot:
    """One driver's map. `make` returns a new one and the node of its host file, or None.

    Context: home thread of the driver's node.
    """

    def __init__(self, make: Callable[[], tuple[DirectMap, BlockDriverState] | None]) -> None:
        self.map: DirectMap | None = None
        """The map that there is now."""
        self._make = make
        self._file_node: BlockDriverState
        self._shut = 0

    def get(self) -> DirectMap | None:
        """The map, made anew if there is none."""
        if self.map is None and not self._shut:
            made = self._make()
            if made is not None:
                self.map, self._file_node = made
                self._file_node.add_map(self.map)
        return self.map

    async def drop(self) -> None:
        """Forget the map; the next user gets a new one.

        Suspends: until the requests that were taken from it are done.
        """
        dropped = self.map
        if dropped is not None:
            await dropped.close()
            if dropped is self.map:
                self.map = None
                self._file_node.remove_map(dropped)

    @asynccontextmanager
    async def shut(self) -> AsyncIterator[None]:
        """Inside, there is no map, and none is made: whatever it would say is about to change."""
        self._shut += 1
        try:
            await self.drop()
            yield
        finally:
            self._shut -= 1
