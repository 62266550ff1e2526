# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of an open image, between the node that records in them and the file.

A bitmap in the file is either as it should be, or marked *in use*: then nobody may believe it. So
the order is

    opened for writing    the bits are read; bitmaps that record are marked in use, durably, before
                          the first write to the disk
    another one changes   it is marked, durably, before the change
    closed, or `store`d   new bits, tables and a new directory are written beside what is there, and
                          are made durable
                          -> header: the bitmaps extension names the new directory
                          the old places are freed

A crash leaves the old directory with its marks, or the new one. One that is found in use is
inconsistent from then on: it is listed, kept as it is, and can be removed. QEMU marks those that
don't record, too, as soon as the image is opened; ours stay good until somebody changes them.

A mark is one word of a directory entry, and is set and taken off in place. When the last step, the
header or the marks, fails, nobody knows what the disk has: then the node refuses further writes,
which a bitmap without a mark might lack.

Opened read-only, all stays as it is, and bits are read when somebody asks for them.

Memory: bits that are alike take none (sparse_bits.py). What the bitmaps of an image hold when it is
opened is bounded by LOADED_BYTES_MAX, and counts as a part of the image's share.

Context: home thread of the node's AioContext, nobody else at work on the image's metadata: drained,
or being opened or closed; under the metadata mutex.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from blockemu.drivers.dirty_bitmap import DirtyBitmap
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2 import bitmap_table
from blockemu.drivers.qcow2.bitmap_directory import (
    AUTO,
    BITMAP_BYTES_MAX,
    BITMAPS_MAX,
    IN_USE,
    NAME_BYTES_MAX,
    BitmapDirectory,
    BitmapEntry,
    bits_of,
    encoded,
    serialise,
    table_entries,
)
from blockemu.drivers.qcow2.layout import div_up, round_up
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.drivers.sparse_bits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockemu.drivers.metadata_budget import Share
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.qcow2.image import Image

log = logging.getLogger(__name__)

LOADED_BYTES_MAX: Final = 128 << 20
"""What the bits of an image's bitmaps may take of memory when they are read: four times those of a
16 TiB disk with a bit for each 64 KiB, if nothing of them is alike."""


class BitmapStore:
    """One image's. The directory is that of the image's header."""

    def __init__(self, image: Image, node: BlockDriverState, share: Share) -> None:
        self._image = image
        self._node = node
        self._share = share
        self._room_bytes = LOADED_BYTES_MAX
        self._reserve(sum(self._bytes_of(at.granularity_bits) for at in self.directory.entries))

    @property
    def directory(self) -> BitmapDirectory:
        return self._image.header_file.bitmaps

    def _bytes_of(self, granularity_bits: int) -> int:
        bits = bits_of(self._image.header.size, granularity_bits=granularity_bits)
        return round_up(bits // 8 + 1, CHUNK_BYTES)

    def _reserve(self, wanted_bytes: int) -> None:
        """More memory, for bitmaps that take so much when nothing in them is alike."""
        part = self._share.parts.get("bitmaps")
        if part is not None:
            part.bytes_max += wanted_bytes
        elif wanted_bytes:
            self._share.reserve("bitmaps", wanted_bytes, least_bytes=wanted_bytes)
            self._share.parts["bitmaps"].used = self._bytes_used

    def _bytes_used(self) -> int:
        return sum(bitmap.bits.bytes_bound for bitmap in self._node.dirty_bitmaps.values())

    # --- opening ---

    async def open(self) -> None:
        """Read all bitmaps of an image that is opened for writing, and mark those that record.

        Suspends: for I/O. Raises: ImageError, for a table that lies; OSError.
        """
        if not self.directory.entries:
            return
        self._refuse_overlaps()
        for entry in self.directory.entries:
            await self._load(entry)
        await self._mark(entry for entry in self.directory.entries if entry.auto)

    async def load(self, name: str) -> DirtyBitmap | None:
        """A bitmap of an image that is open, read now if it wasn't. Raises: as `open`."""
        found = self._node.dirty_bitmaps.get(name)
        entry = self.directory.find(name)
        if found is not None or entry is None:
            return found
        return await self._load(entry)

    async def _load(self, entry: BitmapEntry) -> DirtyBitmap:
        image = self._image
        bits = None
        if not entry.in_use:
            bits = await bitmap_table.load_bits(
                image.name, image.header, image.file, entry,
                room_bytes=self._room_bytes,
            )  # fmt: skip
            self._room_bytes -= bits.bytes_bound
        bitmap = DirtyBitmap(
            entry.name, image.header.size, granularity=1 << entry.granularity_bits,
            enabled=entry.auto, persistent=True,
            inconsistent=entry.in_use, bits=bits,
        )  # fmt: skip
        self._node.adopt_bitmap(bitmap)
        return bitmap

    def _refuse_overlaps(self) -> None:
        """The directory and the tables lie where nothing else does. Raises: ImageError."""
        image = self._image
        directory, image.header_file.bitmaps = self.directory, BitmapDirectory()
        try:
            others = image.refcounts.metadata_places()
        finally:
            image.header_file.bitmaps = directory
        end = 0
        for what, offset, length in sorted(directory.ranges(), key=lambda found: found[1]):
            first = offset >> image.layout.cluster_bits
            stop = first + div_up(length, image.layout.cluster_size)
            at = bisect_left(others, first)
            if first < end or (at < len(others) and others[at] < stop):
                raise ImageError(
                    image.name,
                    f"{what}, at offset {offset:#x}, lies over other metadata: it is damaged",
                )
            end = stop

    # --- while it is open ---

    def prepare_new(self, name: str, granularity: int) -> None:
        """Count on a new bitmap, or refuse one that couldn't be stored. Raises: ImageError."""
        image = self._image
        if image.header.version < 3:
            raise ImageError(image.name, "version 2 (compat=0.10) can't store bitmaps")
        if not image.header.size:
            raise ImageError(image.name, "a disk of 0 bytes can't have stored bitmaps")
        if len(encoded(name)) > NAME_BYTES_MAX:
            raise ImageError(image.name, f"a bitmap's name has at most {NAME_BYTES_MAX} bytes")
        taken_bytes = self._bytes_of(granularity.bit_length() - 1)
        if taken_bytes > BITMAP_BYTES_MAX:
            raise ImageError(
                image.name,
                f"bitmap '{name}' would take more than 512 MiB: choose a larger granularity",
            )
        kept = sum(bitmap.persistent for bitmap in self._node.dirty_bitmaps.values())
        if kept >= BITMAPS_MAX:
            raise ImageError(image.name, f"has {BITMAPS_MAX} bitmaps, the most that there can be")
        self._reserve(taken_bytes)

    async def changing(self, bitmaps: Iterable[DirtyBitmap]) -> None:
        """Their bits are about to change: mark them in the file, durably. Raises: OSError."""
        names = {bitmap.name for bitmap in bitmaps if bitmap.persistent}
        await self._mark(entry for entry in self.directory.entries if entry.name in names)

    async def _mark(self, entries: Iterable[BitmapEntry]) -> None:
        flags = {entry.name: entry.flags | IN_USE for entry in entries}
        await self._set_flags(flags)

    async def _set_flags(self, flags: dict[str, int]) -> None:
        """In place, and durably."""
        image, directory = self._image, self.directory
        entries = list(directory.entries)
        writes = []
        takes_off = False
        for index, offset in enumerate(directory.flag_offsets()):
            wanted = flags.get(entries[index].name, entries[index].flags)
            if wanted != entries[index].flags:
                entries[index] = replace(entries[index], flags=wanted)
                writes.append((offset, wanted.to_bytes(4, "big")))
                takes_off |= not wanted & IN_USE
        if writes:
            try:
                await image.file.write_all(writes)
                await image.file.flush()
            except BaseException:
                if takes_off:
                    self._refuse_writes()
                raise
            image.header_file.bitmaps = replace(directory, entries=tuple(entries))

    async def remove(self, name: str) -> None:
        """Take a bitmap out of the file, if it is there. Durable when this returns.

        Raises: ImageError, OSError; it is there then.
        """
        entry = self.directory.find(name)
        if entry is not None:
            rest = tuple(other for other in self.directory.entries if other is not entry)
            await self._move(rest, taken=[], dropped=[entry])

    async def store(self) -> None:
        """Bring all bitmaps that are to be kept to the file, and take the marks off. Durable when
        this returns; nothing records after it.

        Raises: ImageError, OSError: what the file has stays as it is, marks included.
        """
        image = self._image
        kept = [bitmap for bitmap in self._node.dirty_bitmaps.values() if bitmap.persistent]
        before = {entry.name: entry for entry in self.directory.entries}
        entries: list[BitmapEntry] = []
        taken: list[Reference] = []
        dropped: list[BitmapEntry] = []
        try:
            for bitmap in kept:
                old = before.get(bitmap.name)
                if old is not None and bitmap.inconsistent:
                    entries.append(old)
                elif old is not None and not bitmap.changed:
                    entries.append(replace(old, flags=_flags(bitmap, old)))
                else:
                    entry, places = await self._write(bitmap, old)
                    entries.append(entry)
                    taken += places
                    dropped += [old] if old is not None else []
        except BaseException:
            await bitmap_table.release(image, taken)
            raise
        if not taken and len(entries) == len(before):
            await self._set_flags({entry.name: entry.flags for entry in entries})
        else:
            await self._move(tuple(entries), taken=taken, dropped=dropped)
        for bitmap in kept:
            bitmap.changed = False

    async def _write(
        self, bitmap: DirtyBitmap, old: BitmapEntry | None
    ) -> tuple[BitmapEntry, list[Reference]]:
        bits = bitmap.granularity.bit_length() - 1
        count = table_entries(self._image.header, granularity_bits=bits)
        offset, taken = await bitmap_table.write_bits(self._image, bitmap.bits, entries=count)
        entry = BitmapEntry(
            name=bitmap.name, table_offset=offset, table_entries=count,
            flags=_flags(bitmap, old), granularity_bits=bits,
            extra=old.extra if old is not None else b"",
        )  # fmt: skip
        return entry, taken

    async def _move(
        self, entries: tuple[BitmapEntry, ...], *, taken: list[Reference],
        dropped: list[BitmapEntry],
    ) -> None:  # fmt: skip
        """Have the header name a new directory of these entries, whose new clusters are `taken`;
        free the old directory and what the `dropped` entries name."""
        image, before = self._image, self.directory
        taken = list(taken)
        try:
            freed = [place for entry in dropped for place in await self._places_of(entry)]
            data = serialise(image.name, entries)
            offset = 0
            if data:
                place = await bitmap_table.write_table(image, data)
                taken.append(place)
                offset = place.first << image.layout.cluster_bits
            await image.writer.flush()
        except BaseException:
            await bitmap_table.release(image, taken)
            raise
        try:
            await image.header_file.move_bitmaps(BitmapDirectory(offset, len(data), entries))
        except ImageError:  # it doesn't fit; nothing has been written
            await bitmap_table.release(image, taken)
            raise
        except BaseException:
            self._refuse_writes()
            raise
        clusters = div_up(before.length, image.layout.cluster_size)
        if clusters:
            first = before.offset >> image.layout.cluster_bits
            freed.append(Reference(first, clusters, is_table=True))
        await bitmap_table.release(image, freed)

    def _refuse_writes(self) -> None:
        name = self._image.name
        self._node.refuse_writes(f"{name}: what its bitmaps are on the disk is not known")

    async def _places_of(self, entry: BitmapEntry) -> list[Reference]:
        """What is free without the entry; of a table that lies, nobody knows: that much leaks."""
        try:
            return await bitmap_table.places_of(self._image, entry)
        except ImageError as error:
            log.warning("%s; what it names is not freed", error)
            return []

    def facts(self) -> list[dict[str, Any]]:
        """Qcow2BitmapInfo of each, under QEMU's names, as the file has them."""
        return [
            {
                "flags": ["in-use"] * entry.in_use + ["auto"] * entry.auto,
                "name": entry.name,
                "granularity": 1 << entry.granularity_bits,
            }
            for entry in self.directory.entries
        ]


def _flags(bitmap: DirtyBitmap, old: BitmapEntry | None) -> int:
    """Of a bitmap that is stored as it is now."""
    others = old.flags & ~(IN_USE | AUTO) if old is not None else 0
    return others | (AUTO if bitmap.enabled else 0)
