# SPDX-License-Identifier: Apache-2.0
"""Which meta contexts an export offers besides base:allocation: bitmaps, and the allocation depth.

A bitmap is looked for on the export's node and then down its backing chain, as QEMU does, so that
an overlay can be exported with the bitmap of its base. While it is offered it is *busy*: nobody
removes, clears or merges into it, so that clients of one connection after the other see one thing.

A bitmap that records is refused for a read-only export of a node that can be written, by whomever:
a client of such an export counts on a disk that stands still. Messages are QEMU's.

Context: home thread of the backend's context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers import bitmap_commands
from blockemu.drivers.bitmap_commands import node_label
from blockemu.drivers.chain_status import backing_node
from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.drivers.node import BlockDriverState
    from blockemu.exports import Export


async def offer(
    export: Export, *, bitmaps: Iterable[str] = (), allocation_depth: bool = False
) -> None:
    """Have the export offer these bitmaps, by name, and qemu:allocation-depth or not.

    To be called once, before clients come; `withdraw` is its opposite.
    Suspends: for bitmaps to be read. Raises: ImageError; nothing is offered then.
    """
    assert not export.bitmaps, export.bitmaps
    node = export.backend.node
    found: list[DirtyBitmap] = []
    for name in dict.fromkeys(bitmaps):
        bitmap = await _find(node, name)
        if export.read_only and not node.read_only and bitmap.enabled:
            reason = f"Enabled bitmap '{name}' incompatible with readonly export"
            raise ImageError(node_label(node), reason)
        found.append(bitmap)
    # Nothing suspends from here on, so nobody else can take one of them.
    taken = next((bitmap for bitmap in found if bitmap.busy), None)
    if taken is not None:
        raise ImageError(node_label(node), bitmap_commands.in_use(taken.name))
    for bitmap in found:
        bitmap.busy = True
    export.bitmaps = tuple(found)
    export.allocation_depth = allocation_depth


def withdraw(export: Export) -> None:
    """Its bitmaps are everybody's again. No client is left."""
    for bitmap in export.bitmaps:
        bitmap.busy = False
    export.bitmaps = ()
    export.allocation_depth = False


async def _find(node: BlockDriverState, name: str) -> DirtyBitmap:
    at: BlockDriverState | None = node
    while at is not None:
        if await at.driver.load_bitmap(name) is not None:
            return await bitmap_commands.find(at, name)
        at = backing_node(at)
    raise ImageError(node_label(node), f"Bitmap '{name}' is not found")
