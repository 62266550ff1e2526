# SPDX-License-Identifier: Apache-2.0
"""Host clusters for what a disk gains when it grows, before its guest writes there.

    metadata    the tables name them; they may be holes in the file
    falloc      the host has given the file their space
    full        zeroes are written to them

A host cluster reads as zeroes before an entry names it. So after a crash on the way, what lies
behind the disk's old end is zeroes, and a disk that grows again later may keep it.

With extended L2 entries a cluster gets its place and no subcluster in it, as QEMU has it.

Context: home thread of the node's AioContext.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.qcow2.layout import div_up

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.guest_write import Target
    from blockemu.drivers.qcow2.image import Image
    from blockemu.drivers.qcow2.image_file import ImageFile

WRITE_BYTES: Final = 1024 * 1024
"""Zeroes written at once: bounds the memory."""


async def preallocate(image: Image, start: int, end: int, mode: str) -> None:
    """Preallocate the guest's clusters that begin in `[start, end)`. The caller holds them.

    Suspends: for I/O. Raises: OSError; part may be preallocated then.
    """
    size = image.layout.cluster_size

    async def prepare(target: Target) -> None:
        await _make_zero(image, target, mode)

    await image.guest_writer.give_places(div_up(start, size), div_up(end, size), prepare)
    if image.data_file is None:
        image.preallocated = None  # what was guessed of the smaller image may be wrong now


async def _make_zero(image: Image, target: Target, mode: str) -> None:
    if mode == "metadata" and target.reads_zero:
        return
    bits = image.layout.cluster_bits
    start, end = target.first << bits, (target.first + target.clusters) << bits
    await give_zeroes(image.data.file, start, end, mode)


async def give_zeroes(file: ImageFile, start: int, end: int, mode: str) -> None:
    """Make bytes of a file zero, holding the host's space as `mode` says.

    What is behind the end of the file is zeroes, and stays there. Raises: OSError.
    """
    end = min(end, file.length)
    if start >= end:
        return
    if mode != "full":
        unmap = RequestFlags.NONE if mode == "falloc" else RequestFlags.MAY_UNMAP
        await file.child.pwrite_zeroes(start, end - start, unmap)
        return
    zeroes = memoryview(bytes(min(end - start, WRITE_BYTES)))
    while start < end:
        piece = zeroes[: end - start]
        await file.write(start, piece)
        start += len(piece)
