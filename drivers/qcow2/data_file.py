# SPDX-License-Identifier: Apache-2.0
"""An external data file: the guest's clusters in a file of their own, each at its guest offset.

The qcow2 file then holds metadata only, and its refcounts count only that (specification:
Incompatible features, bit 2). With the autoclear bit "raw external data" the file is a raw image of
the disk besides, at any moment, so whoever reads it without us sees what the guest sees.

That is more than a mapping can give: an entry that says "zero" or "unallocated" is right in the
qcow2 image alone. So in a raw data file all clusters are mapped from the start, and zeroes and
discards change bytes, not entries (data_clusters.py). Then no power cut can bring the two views
apart. QEMU changes both, and after a cut between them they may differ.

The file is as long as the disk, to the byte: what the last cluster has behind the disk's end is
never written.

Context: home thread of the node's AioContext; `open_data_file`: the main context.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from blockemu.drivers.child import Role
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.filename import parse_filename, resolve
from blockemu.drivers.qcow2.guest_data import GuestData
from blockemu.drivers.qcow2.image_file import ImageFile

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.qcow2.header import Header
    from blockemu.drivers.registry import Opener

CHILD = "data-file"
"""The child's name, and the option's."""


class DataFile(ImageFile):
    """The "data-file" child. `disk_bytes`: the disk's length, kept by who resizes it."""

    def __init__(self, child: BdrvChild, *, header: Header, name: str) -> None:
        super().__init__(child, cluster_size=header.cluster_size, name=name)
        self.disk_bytes = header.size
        self.is_raw = header.data_file_is_raw
        self.sparse = False  # what a cluster held before it was discarded may be there still

    def write(self, offset: int, data: memoryview | bytes) -> Coroutine[Any, Any, None]:
        """As ImageFile; what is behind the end of the disk is left out. Raises: OSError."""
        assert offset < self.disk_bytes
        if offset + len(data) > self.disk_bytes:
            data = memoryview(data)[: self.disk_bytes - offset]
        return super().write(offset, data)

    async def cover(self, end: int) -> None:
        """Make a file that somebody left too short as long as the disk, if `end` is behind its end.

        Raises: OSError.
        """
        if min(end, self.disk_bytes) > self.length:
            await self.resize(self.disk_bytes)

    async def resize(self, length: int) -> None:
        """Make the file `length` bytes long. A device that is longer stays as it is.

        Raises: OSError (ENOSPC: a device that is too short).
        """
        if self.host_file is not None and self.host_file.is_block_device:
            if length > self.length:
                raise io_error(errno.ENOSPC, f"{self.name}: the disk doesn't fit on its data file")
            return
        await self.child.truncate(length)
        self.length = length

    async def set_disk_bytes(self, disk_bytes: int) -> None:
        """The disk has another length, and so has the file. Raises: OSError."""
        await self.resize(disk_bytes)
        self.disk_bytes = disk_bytes

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make bytes of the disk zero in the file. Raises: OSError."""
        end = min(offset + length, self.length)  # behind its end, it reads as zeroes
        if offset < end:
            flags = RequestFlags.MAY_UNMAP if may_unmap else RequestFlags.NONE
            await self.child.pwrite_zeroes(offset, end - offset, flags)

    async def reads_zero(self, offset: int, length: int) -> bool:
        """Whether the file is known to have nothing but zeroes there. Raises: OSError."""
        end = min(offset + length, self.length)
        if offset >= end:
            return True
        status = await self.child.block_status(offset, end - offset)
        return status.zero and status.length >= end - offset

    async def discard(self, offset: int, length: int) -> None:
        if offset < self.length:
            await super().discard(offset, length)


class ClosedDataFile(GuestData):
    """In the place of a data file that wasn't opened: there is no data to be had."""

    def read(self, host: int, view: memoryview, guest: int) -> Coroutine[Any, Any, None]:
        raise io_error(errno.EIO, f"{self.file.name}: its external data file isn't open")

    write = read

    @property
    def mapped_file(self) -> None:
        return None


async def open_data_file(
    name: str, header: Header, node: BlockDriverState, options: dict[str, Any], opener: Opener
) -> BdrvChild | None:
    """The data file's child, if the image is to have one: as the option says, else as the header.

    The option null leaves the file alone: the image then can be described, but not read.
    Raises: ImageError.
    """
    given = options.pop(CHILD) if CHILD in options else _named(name, header, node)
    if given is None:
        if header.has_data_file and not node.read_only:
            raise ImageError(name, f"can't be written to without its data file ({CHILD})")
        return None
    if not header.has_data_file:
        raise ImageError(name, f"has no external data file, so it can't be given one ({CHILD})")
    if isinstance(given, dict):
        _refuse_self(name, node, given.get("filename"))
    perm, shared = opener.file_permissions(node)
    try:
        child = await opener.open_child(
            node, CHILD, given, role=Role.DATA, perm=perm, shared=shared
        )
    except ImageError as error:
        if isinstance(given, dict) and error.name == given.get("filename"):
            reason = f"is the external data file of {name}: {error.reason}"
            raise ImageError(error.name, reason) from error
        raise
    _refuse_self(name, node, child.node.filename)
    node.children["file"].role = Role.METADATA
    return child


def _refuse_self(name: str, node: BlockDriverState, other: object) -> None:
    own = node.filename
    if own is None or not isinstance(other, str):
        return
    if os.path.realpath(own) == os.path.realpath(other):
        raise ImageError(name, "can't be its own external data file")


def _named(name: str, header: Header, node: BlockDriverState) -> dict[str, Any] | None:
    if not header.has_data_file:
        return None
    if header.data_file is None:
        raise ImageError(
            name, f"has an external data file and doesn't say which: give the option '{CHILD}'"
        )
    path = resolve(header.data_file, above=node.filename or name, what="external data file")
    tree = parse_filename(path, node.file_options)
    if "driver" not in tree:
        raise ImageError(name, f"external data file '{path}': says no driver")
    return tree
