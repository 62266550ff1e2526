# SPDX-License-Identifier: Apache-2.0
"""The header in the file: read when an image is opened, changed in place while it is.

Most changes write only the fixed fields anew. What follows them, extensions that we know or don't
and the backing file's name, stays as it is, to the byte; they fit in one sector. `replace` writes
all of it anew (header_rewrite.py), for tools: another backing file, another version.

Every change here is rare, and is durable when the call returns. What the new fields point to has to
be durable before; that is the caller's part.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.qcow2.bitmap_directory import (
    AUTOCLEAR_BITMAPS,
    BitmapDirectory,
    with_directory,
)
from blockemu.drivers.qcow2.features import CORRUPT
from blockemu.drivers.qcow2.header import V2_LENGTH, Header, first_cluster_bytes, parse
from blockemu.drivers.qcow2.header_rewrite import rewrite, with_backing
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.snapshot_table import SnapshotTable

if TYPE_CHECKING:
    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.root_table import RootTable

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
        self.bitmaps = BitmapDirectory()
        """The directory that it names."""
        self.on_moved: Callable[[], None] = lambda: None
        """Told when the header has come to name other places of tables. Suspends: never."""
        self._file = file
        self._lost = False
        """A `replace` failed: which header is in the file isn't known."""

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
        self.on_moved()

    async def move_l1(self, *, offset: int, entries: int) -> None:
        self.header.l1_table_offset = offset
        self.header.l1_size = entries
        await self._write()
        self.on_moved()

    async def move_snapshots(self, table: SnapshotTable) -> None:
        self.header.snapshots_offset = table.offset
        self.header.nb_snapshots = len(table.entries)
        await self._write()
        self.snapshots = table
        self.on_moved()

    async def switch(
        self,
        *,
        l1: tuple[int, int],
        reftable: RootTable,
        snapshots: SnapshotTable | None,
        size: int | None,
    ) -> None:
        """Name other tables, and give the disk another size, all by one write. `l1`: offset and
        entries of the L1 table."""
        header = self.header
        header.l1_table_offset, header.l1_size = l1
        header.refcount_table_offset = reftable.offset
        header.refcount_table_clusters = len(reftable) * ENTRY_BYTES // header.cluster_size
        if size is not None:
            header.size = size
        await self.move_snapshots(snapshots if snapshots is not None else self.snapshots)

    async def move_bitmaps(self, directory: BitmapDirectory) -> None:
        """Name another bitmap directory, or none. Guarantees and errors: as `replace`."""
        new = copy.copy(self.header)
        new.extensions = with_directory(self.header, directory)
        new.autoclear_features &= ~AUTOCLEAR_BITMAPS
        if directory.entries:
            new.autoclear_features |= AUTOCLEAR_BITMAPS
        await self.replace(new)
        self.bitmaps = directory
        self.on_moved()

    async def set_size(self, size: int) -> None:
        self.header.size = size
        await self._write()

    async def mark_corrupt(self) -> None:
        """Nobody is to write to the image but to repair it. Version 2 can't say so."""
        if self.header.version >= 3:
            self.header.incompatible_features |= CORRUPT
            await self._write()

    async def set_backing(self, filename: str | None, fmt: str | None) -> None:
        """Name another backing file and its format, or none. What an open image reads through it
        stays as it was; the name counts from the next open on.

        Guarantees and errors: as `replace`.
        """
        await self.replace(with_backing(self._file.name, self.header, filename, fmt))

    async def replace(self, header: Header) -> None:
        """Put `header` in the place of this one, extensions and names included.

        A power cut leaves the old header or the new one, never a mixture: one that fits in a sector
        is switched by a single write, a longer one by way of a copy (header_rewrite.py).
        Suspends: for I/O. Raises: ImageError, when it doesn't fit in the first cluster, and nothing
        has changed; OSError: one of the two is in the file, and no header is written after that.
        """
        try:
            await rewrite(self._file.name, self._file, header)
        except OSError:
            self._lost = True
            raise
        self.header = header
        self.on_moved()

    async def _write(self) -> None:
        if self._lost:
            raise io_error(errno.EIO, f"{self._file.name}: an earlier change of the header failed")
        await self._file.write(0, self.header.fixed_fields())
        await self._file.flush()
