# SPDX-License-Identifier: Apache-2.0
"""Which bitmaps an export may offer, and that they are its own meanwhile. Refusals are QEMU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blockemu.drivers import bitmap_commands
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import Permission
from blockemu.drivers.errors import ImageError
from blockemu.exports import Export
from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.nbd.export_contexts import offer, withdraw
from tests.unit.drivers.qcow2.support import MIB, Disk, Images


@pytest.fixture
def loop() -> Iterator[AioContext]:
    context = AioContext("test", clock=VirtualClock())
    context.adopt()
    yield context
    context.close()


@pytest.fixture
def disk(loop: AioContext) -> Disk:
    """An overlay, writable, with bitmap "mine", which records; its base has "stored", "closed"."""
    images = Images(loop)
    images.create("base", MIB)
    base = images.open("base")
    loop.run(bitmap_commands.add(base.node, "stored", persistent=True))
    loop.run(bitmap_commands.add(base.node, "closed", persistent=True, enabled=False))
    base.close()
    images.create("top", MIB)
    below = images.open("base", read_only=True)
    top = images.open("top", backing=below.node.node_name)
    loop.run(bitmap_commands.add(top.node, "mine"))
    return top


def export(disk: Disk, *, read_only: bool = False) -> Export:
    backend = BlockBackend("disk", disk.node, writable=not read_only, shared=Permission.ALL)
    return Export("disk", backend, read_only=read_only)


def test_bitmaps_are_found_along_the_chain(loop: AioContext, disk: Disk) -> None:
    made = export(disk)
    loop.run(offer(made, bitmaps=["mine", "stored", "mine"], allocation_depth=True))
    assert [bitmap.name for bitmap in made.bitmaps] == ["mine", "stored"]
    assert made.allocation_depth


def test_an_offered_bitmap_is_busy_until_it_is_withdrawn(loop: AioContext, disk: Disk) -> None:
    made = export(disk)
    loop.run(offer(made, bitmaps=["mine"]))
    in_use = "Bitmap 'mine' is currently in use by another operation and cannot be used"
    with pytest.raises(ImageError, match=in_use):
        loop.run(bitmap_commands.clear(disk.node, "mine"))
    with pytest.raises(ImageError, match=in_use):
        loop.run(offer(export(disk), bitmaps=["mine"]))
    disk.write(0, b"x")
    assert made.bitmaps[0].count() > 0, "it goes on recording"
    withdraw(made)
    assert made.bitmaps == ()
    loop.run(bitmap_commands.clear(disk.node, "mine"))
    loop.run(offer(export(disk), bitmaps=["mine"]))


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["mine"], "Enabled bitmap 'mine' incompatible with readonly export"),
        (["closed", "none"], "Bitmap 'none' is not found"),
    ],
)
def test_a_refused_bitmap_leaves_all_as_it_was(
    loop: AioContext, disk: Disk, names: list[str], complaint: str
) -> None:
    made = export(disk, read_only=True)
    with pytest.raises(ImageError, match=complaint):
        loop.run(offer(made, bitmaps=names, allocation_depth=True))
    assert (made.bitmaps, made.allocation_depth) == ((), False)
    assert not any(bitmap.busy for bitmap in disk.node.dirty_bitmaps.values())
    loop.run(bitmap_commands.disable(disk.node, "mine"))
    loop.run(offer(made, bitmaps=["mine", "closed"]))


def test_a_recording_bitmap_of_a_read_only_image_may_be_offered(loop: AioContext) -> None:
    images = Images(loop)
    images.create("disk", MIB)
    disk = images.open("disk")
    loop.run(bitmap_commands.add(disk.node, "b0", persistent=True))
    disk.close()
    made = export(images.open("disk", read_only=True), read_only=True)
    loop.run(offer(made, bitmaps=["b0"]))
    assert made.bitmaps[0].enabled
