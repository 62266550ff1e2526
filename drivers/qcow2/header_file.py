# SPDX-License-Identifier: Apache-2.0
"""The header in the file: read when an image is opened, changed in place while it is.

Only the fixed fields are ever written anew. What follows them, extensions that we know or don't and
the backing file's name, stays as it is, to the byte.

Every change here is rare, fits in one sector, and is durable when the call returns. What the new
fields point to has to be durable before; that is the caller's part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.features import CORRUPT
from blockemu.drivers.qcow2.header import V2_LENGTH, Header, first_cluster_bytes, parse
from blockemu.drivers.qcow2.snapshot_table import SnapshotTable

if TYPE_CHECKING:
    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.qcow2.image_file import ImageFile

FIRST_READ_BYTES = 4096


async def read_header(name: str, child: BdrvChild) -> Header:
    """Read and parse the header. Raises: ImageError."""
    length = child.length_bytes
    try:
        start = await _read(child, min(FIRST_READ_BYTES, length))
        if len(start) < V2_LENGTH:
            raise ImageError(name, f"not a qcow2 image: {length} bytes are too few for a header")
        cluster = first_cluster_bytes(name, start)
        return parse(name, await _read(child, min(cluster, length)))
    except OSError as error:
        raise ImageError.from_os_error(name, error) from error


async def _read(child: BdrvChild, length: int) -> bytes:
    data = bytearray(length)
    await child.preadv(0, memoryview(data))
    return bytes(data)


class HeaderFile:
    """The header of an open image, in memory and in the file."""

    def __init__(self, header: Header, file: ImageFile) -> None:
        self.header = header
        self.snapshots = SnapshotTable()
        """The table that the header names."""
        self._file = file

    async def clear_autoclear(self) -> None:
        """We know no autoclear feature's data, so we are about to make it stale: say so first."""
        if self.header.autoclear_features:
            self.header.autoclear_features = 0
            await self._write()

    async def keep_autoclear(self, known: int) -> None:
        """The caller keeps the data of the autoclear features `known` right, no others."""
        if self.header.autoclear_features & ~known:
            self.header.autoclear_features &= known
            await self._write()

    async def clear_incompatible(self, features: int) -> None:
        """Take incompatible feature bits off, if they are set."""
        if self.header.incompatible_features & features:
            self.header.incompatible_features &= ~features
            await self._write()

    async def move_refcount_table(self, *, offset: int, clusters: int) -> None:
        self.header.refcount_table_offset = offset
        self.header.refcount_table_clusters = clusters
        await self._write()

    async def move_l1(self, *, offset: int, entries: int) -> None:
        self.header.l1_table_offset = offset
        self.header.l1_size = entries
        await self._write()

    async def move_disk(self, *, offset: int, entries: int, size: int) -> None:
        """Another L1 table with another size, at once."""
        self.header.size = size
        await self.move_l1(offset=offset, entries=entries)

    async def move_snapshots(self, table: SnapshotTable) -> None:
        self.header.snapshots_offset = table.offset
        self.header.nb_snapshots = len(table.entries)
        await self._write()
        self.snapshots = table

    async def set_size(self, size: int) -> None:
        self.header.size = size
        await self._write()

    async def mark_corrupt(self) -> None:
        """Nobody is to write to the image but to repair it. Version 2 can't say so."""
        if self.header.version >= 3:
            self.header.incompatible_features |= CORRUPT
            await self._write()

    async def _write(self) -> None:
        await self._file.write(0, self.header.fixed_fields())
        await self._file.flush()
