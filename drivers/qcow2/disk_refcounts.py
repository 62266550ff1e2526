# SPDX-License-Identifier: Apache-2.0
"""The refcounts as they stand in the file, believed in nothing: for the check and its repair.

Unlike refcount.py, which serves an image in use, this reads whole blocks, takes damaged table
entries as they are, and changes nothing. A block is also had *clipped*: a byte for each count,
whatever the width, 255 for that and more. Bytes can be compared and counted by the megabyte.
"""

from __future__ import annotations

import errno
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from blockemu.drivers.errors import io_error
from blockemu.drivers.qcow2.layout import REFTABLE_RESERVED, Layout
from blockemu.drivers.qcow2.reference_counts import LARGE
from blockemu.drivers.qcow2.table_cache import words_from

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.header import Header
    from blockemu.drivers.qcow2.image_file import ImageFile

FILE_BYTES_MAX = 1 << 63
"""No file has an offset from here on."""

CACHED_BYTES_MAX = 8 * 1024 * 1024
"""Clipped blocks that are kept; at least two."""


class BlockWidth:
    """Refcount entries of one width in the bytes of a block. Suspends: never.

    Layout: refcount_width.py tells it.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._bytes = 1 << (order - 3) if order >= 3 else 0
        self._value_mask = (1 << (1 << order)) - 1

    def clip(self, data: bytes) -> bytes:
        """A byte for each entry."""
        if self._bytes == 1:
            return bytes(data)
        if not self._bytes:
            return self._clip_bits(data)
        low = bytearray(data[self._bytes - 1 :: self._bytes])
        for lane in range(self._bytes - 1):
            high = data[lane :: self._bytes]
            if high.count(0) != len(high):
                for index, byte in enumerate(high):
                    if byte:
                        low[index] = LARGE
        return bytes(low)

    def _clip_bits(self, data: bytes) -> bytes:
        per_byte = 8 >> self._order
        found = bytearray(len(data) * per_byte)
        for position in range(per_byte):
            shift = position << self._order
            values = bytes(byte >> shift & self._value_mask for byte in range(256))
            found[position::per_byte] = data.translate(values)
        return bytes(found)

    def encode(self, clipped: bytes) -> bytearray:
        """A block of counts that are all below 255, or fit the width at least."""
        if self._bytes:
            data = bytearray(len(clipped) * self._bytes)
            data[self._bytes - 1 :: self._bytes] = clipped
            return data
        per_byte = 8 >> self._order
        packed = 0
        for position in range(per_byte):
            shift = position << self._order
            moved = bytes(value << shift & 0xFF for value in range(256))
            packed |= int.from_bytes(clipped[position::per_byte].translate(moved), "little")
        return bytearray(packed.to_bytes(len(clipped) // per_byte, "little"))

    def get(self, data: bytes | bytearray, index: int) -> int:
        if self._bytes:
            return int.from_bytes(data[index * self._bytes : (index + 1) * self._bytes], "big")
        bit = index << self._order
        return data[bit >> 3] >> (bit & 7) & self._value_mask

    def set(self, data: bytearray, index: int, value: int) -> None:
        if self._bytes:
            data[index * self._bytes : (index + 1) * self._bytes] = value.to_bytes(
                self._bytes, "big"
            )
            return
        bit = index << self._order
        byte, shift = bit >> 3, bit & 7
        data[byte] = data[byte] & ~(self._value_mask << shift) | value << shift


class DiskRefcounts:
    """Refcount table and blocks of the image that `header` describes.

    Context: home thread of the file's AioContext.
    """

    def __init__(self, layout: Layout, file: ImageFile, table: array[int]) -> None:
        self.table = table
        self.width = BlockWidth(layout.refcount_order)
        self._layout = layout
        self._file = file
        self._clipped: OrderedDict[int, bytes] = OrderedDict()
        self._cached_max = max(2, CACHED_BYTES_MAX // layout.block_entries)

    @classmethod
    async def read(cls, header: Header, file: ImageFile) -> DiskRefcounts:
        """Raises: OSError. What of the table lies past the end of the file is zeroes."""
        length = header.refcount_table_clusters << header.cluster_bits
        data = bytearray(length)
        await file.read(header.refcount_table_offset, memoryview(data))
        return cls(header.layout, file, words_from("Q", data))

    def block_offset(self, index: int) -> int:
        """Where a block lies, by its entry in the table; 0 where there is none."""
        if index >= len(self.table):
            return 0
        return self.table[index] & ~REFTABLE_RESERVED

    def is_readable(self, index: int) -> bool:
        """Whether the entry can be followed: a block that isn't there counts 0 for all."""
        host = self.block_offset(index)
        return not host & (self._layout.cluster_size - 1) and host < FILE_BYTES_MAX

    async def block(self, index: int) -> bytes:
        """A block's bytes; zeroes where there is none, and past the end of the file.

        Raises: OSError (EIO: an entry that can't be followed).
        """
        host = self.block_offset(index)
        if not self.is_readable(index):
            raise io_error(errno.EIO, f"refcount block {index} at {host:#x} can't be anywhere")
        data = bytearray(self._layout.cluster_size)
        if host:
            await self._file.read(host, memoryview(data))
        return bytes(data)

    async def clipped(self, first: int, clusters: int) -> bytes:
        """The counts of a run of clusters, a byte each. Raises: OSError."""
        bits = self._layout.block_bits
        end = first + clusters
        parts = []
        while first < end:
            block = await self._clipped_block(first >> bits)
            start = first & (self._layout.block_entries - 1)
            stop = min(start + end - first, self._layout.block_entries)
            parts.append(block[start:stop] if block is not None else bytes(stop - start))
            first += stop - start
        return b"".join(parts)

    async def _clipped_block(self, index: int) -> bytes | None:
        if not self.block_offset(index):
            return None
        found = self._clipped.get(index)
        if found is None:
            found = self.width.clip(await self.block(index))
            self._clipped[index] = found
            if len(self._clipped) > self._cached_max:
                self._clipped.popitem(last=False)
        else:
            self._clipped.move_to_end(index)
        return found
