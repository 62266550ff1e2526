# SPDX-License-Identifier: Apache-2.0
"""What users do to dirty bitmaps by name, and what they may not: add, remove, clear, enable,
disable, merge. Messages are QEMU's, so that tools which look for them find them.

A persistent bitmap that changes is marked as such in its image first, durably, so that a crash
never leaves an image that calls an old state good (`BlockDriver.bitmaps_changing`).

Context: home thread of the node's AioContext.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.dirty_bitmap import (
    GRANULARITY_MAX,
    GRANULARITY_MIN,
    NAME_BYTES_MAX,
    DirtyBitmap,
    default_granularity,
)
from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState


def node_label(node: BlockDriverState) -> str:
    """What messages call a node."""
    return node.filename or node.node_name


async def add(
    node: BlockDriverState,
    name: str,
    *,
    granularity: int | None = None,
    persistent: bool = False,
    enabled: bool = True,
) -> DirtyBitmap:
    """A new bitmap, clean. `granularity` None: as the format's clusters are.

    Suspends: until writes under way are done, if it is to record. Raises: ImageError.
    """
    if not name:
        raise ImageError(node_label(node), "Bitmap name cannot be empty")
    if granularity is None:
        granularity = default_granularity(node.driver.cluster_size)
    is_power = granularity > 0 and not granularity & (granularity - 1)
    if not is_power or not GRANULARITY_MIN <= granularity <= GRANULARITY_MAX:
        bound = " (and at most 2 GiB)" if granularity > GRANULARITY_MAX else ""
        raise ImageError(
            node_label(node), f"Granularity must be power of 2 and at least 512{bound}"
        )
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX:
        raise ImageError(node_label(node), f"Bitmap name too long (at most {NAME_BYTES_MAX} bytes)")
    if await node.driver.load_bitmap(name) is not None:
        raise ImageError(node_label(node), f"Bitmap already exists: {name}")
    if persistent:
        _refuse_read_only(node, name)
        node.driver.prepare_bitmap(name, granularity)
    bitmap = DirtyBitmap(
        name, node.length_bytes, granularity=granularity, enabled=enabled, persistent=persistent
    )
    await node.add_bitmap(bitmap)
    return bitmap


async def find(node: BlockDriverState, name: str, *, usable: bool = True) -> DirtyBitmap:
    """The bitmap of this name; `usable`: only one that nobody else uses and that can be believed.

    Suspends: for it to be read. Raises: ImageError.
    """
    bitmap = await node.driver.load_bitmap(name)
    if bitmap is None:
        raise ImageError(node_label(node), f"Dirty bitmap '{name}' not found")
    if bitmap.busy:
        raise ImageError(node_label(node), in_use(name))
    if usable and bitmap.inconsistent:
        raise ImageError(
            node_label(node),
            f"Bitmap '{name}' is inconsistent and cannot be used: it can only be removed",
        )
    return bitmap


def in_use(name: str) -> str:
    """Why a busy bitmap isn't to be had."""
    return f"Bitmap '{name}' is currently in use by another operation and cannot be used"


async def remove(node: BlockDriverState, name: str) -> None:
    """Delete a bitmap, a persistent one from its image, too. Raises: ImageError; OSError."""
    bitmap = await find(node, name, usable=False)
    if bitmap.persistent:
        _refuse_read_only(node, name)
        await node.driver.remove_stored_bitmap(name)
    await node.remove_bitmap(bitmap)


async def clear(node: BlockDriverState, name: str) -> None:
    """All is clean, from now on. Raises: ImageError; OSError."""
    bitmap = await _find_to_change(node, name)
    bitmap.clear()


async def enable(node: BlockDriverState, name: str) -> None:
    """It records, from now on. Suspends: until writes under way are done.

    Raises: ImageError; OSError.
    """
    bitmap = await _find_to_change(node, name)
    await node.set_recording(bitmap, enabled=True)


async def disable(node: BlockDriverState, name: str) -> None:
    """It stays as it is, from now on. Raises: ImageError; OSError."""
    bitmap = await _find_to_change(node, name)
    await node.set_recording(bitmap, enabled=False)


async def merge(node: BlockDriverState, name: str, *sources: DirtyBitmap) -> None:
    """What is dirty in any of `sources`, of this node or others, is dirty in the bitmap, too.

    Raises: ImageError; OSError; nothing has changed then.
    """
    bitmap = await find(node, name)
    for source in sources:
        if bitmap.length_bytes != source.length_bytes:
            raise ImageError(
                node_label(node),
                f"Bitmaps are of different sizes (destination size is {bitmap.length_bytes}, "
                f"source size is {source.length_bytes}) and can't be merged",
            )
    bitmap = await _find_to_change(node, name)
    for source in sources:
        bitmap.merge(source)


async def _find_to_change(node: BlockDriverState, name: str) -> DirtyBitmap:
    bitmap = await find(node, name)
    if bitmap.persistent:
        _refuse_read_only(node, name)
        await node.driver.bitmaps_changing([bitmap])
    return bitmap


def _refuse_read_only(node: BlockDriverState, name: str) -> None:
    if node.read_only:
        raise ImageError(node_label(node), f"Bitmap '{name}' is readonly and cannot be modified")
