# SPDX-License-Identifier: Apache-2.0
"""qcow2: the block driver. What the node asks for, handed to the parts of this folder.

Each request takes its guest clusters' lock (cluster_lock.py) for as long as it lasts: shared for
what happens in place, exclusive for what changes the mapping. A write tries in place first.
"""

from __future__ import annotations

import errno
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from blockemu.drivers.child import Permission, Role
from blockemu.drivers.direct_map import PAGE_BYTES, PAGES_MAX, DirectMap
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.filename import is_json
from blockemu.drivers.map_slot import MapSlot
from blockemu.drivers.options import take_dict, take_str
from blockemu.drivers.qcow2 import resize, snapshot, status, status_walk
from blockemu.drivers.qcow2.bitmap_directory import BitmapDirectory, read_directory
from blockemu.drivers.qcow2.bitmap_store import BitmapStore
from blockemu.drivers.qcow2.compression import TYPE_NAMES
from blockemu.drivers.qcow2.data_file import open_data_file
from blockemu.drivers.qcow2.features import CORRUPT, DIRTY, LAZY_REFCOUNTS
from blockemu.drivers.qcow2.header import MAGIC, Header, check_tables
from blockemu.drivers.qcow2.header_file import read_header
from blockemu.drivers.qcow2.image import Image, open_image
from blockemu.drivers.qcow2.layout import SECTOR, div_up
from blockemu.drivers.qcow2.options import L2_CACHE, REFCOUNT_CACHE, take_options
from blockemu.drivers.qcow2.probe import names_other_file
from blockemu.drivers.qcow2.snapshot_table import Snapshot, SnapshotTable, read_table
from blockemu.loop.clock import ClockType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.drivers.metadata_budget import Share
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.qcow2.encryption import Encryption
    from blockemu.drivers.registry import Opener
    from blockemu.drivers.status_runs import StatusRuns

log = logging.getLogger(__name__)

GUEST_CLUSTER_MAX = 1 << 55
"""Behind every guest cluster."""

MAP_PAGES_MIN = 4096
"""Clusters that an image's direct map holds however little memory is left."""


class Qcow2Driver(BlockDriver):
    """Options: `file`; `backing` (a node, its options, or null for none; missing: as the header
    says); `data-file` (likewise, where the header says that there is one); `snapshot` (an id or a
    name: show that one, read-only); `encrypt.key-secret` (the id of the secret of an encrypted
    image); those of options.py."""

    name = "qcow2"
    supports_compressed_writes = True

    def __init__(self, node: Any, image: Image, file: BdrvChild, share: Share) -> None:
        super().__init__(node)
        self.image = image
        self.metadata_share: Share = share
        self.bitmaps = BitmapStore(image, node, share)
        self._writable = not node.read_only
        self._pages_max = self._take_share(share)
        self._file = file
        self._bits = image.layout.cluster_bits
        self._map_slot = MapSlot(self._make_map)
        self.supports_compressed_writes = not image.header.has_data_file
        image.mark.refuse_writes = self._refuse_writes

    @classmethod
    async def open(cls, node: Any, options: dict[str, Any], opener: Opener) -> Self:
        perm, shared = opener.file_permissions(node)
        file = await opener.open_child(
            node,
            "file",
            options.pop("file", None),
            role=Role.DATA | Role.METADATA,
            perm=perm,
            shared=shared,
        )
        name = node.filename or node.node_name
        header = await read_header(name, file)
        snapshots = await _read_snapshots(name, header, file)
        given = frozenset(options)
        _choose_snapshot(name, header, snapshots, file, node, options)
        encryption = await _open_encryption(name, header, file, node, options, opener)
        data_child = await open_data_file(name, header, node, options, opener)
        share = opener.metadata_budget.new_share()
        try:
            own = take_options(name, options, header.layout, header.size, share, unmap=node.unmap)
            image = await open_image(
                name, header, file, read_only=node.read_only, options=own,
                buffers=lambda: node.ctx.buffers, data_child=data_child, encryption=encryption,
            )  # fmt: skip
            image.header_file.snapshots = snapshots
            if "snapshot" not in given:
                image.header_file.bitmaps = await _read_bitmaps(name, image)
            if not node.read_only:
                await image.overlaps.places.read_inactive()
            image.reader.backing = await _open_backing(name, header, node, options, opener)
            driver = cls(node, image, file, share)
            await driver._open_bitmaps()
        except BaseException:
            share.release()
            raise
        return driver

    @classmethod
    def recognises(cls, start: bytes) -> bool:
        # Versions to come, too: better refused as qcow2 than served as raw bytes.
        return start[:4] == MAGIC and start[4:8] not in (b"", b"\0\0\0\1")

    @classmethod
    def names_other_file(cls, start: bytes) -> str | None:
        return names_other_file(start)

    @classmethod
    def options_alone(cls, *, read_only: bool) -> dict[str, Any]:
        # Without its data file it can't be written to.
        return {"backing": None, "data-file": None} if read_only else {"backing": None}

    @property
    def length_bytes(self) -> int:
        return self.image.guest_writer.disk_bytes

    @property
    def cluster_size(self) -> int:
        return self.image.layout.cluster_size

    @property
    def request_alignment(self) -> int:
        return SECTOR if self.image.encryption is not None else 1

    # --- requests ---

    async def preadv(self, offset: int, view: memoryview) -> None:
        image = self.image
        first, last = offset >> self._bits, (offset + len(view) - 1) >> self._bits
        held = image.locks.try_shared(first, last) or await image.locks.shared(first, last)
        try:
            await image.reader.read(offset, view)
        finally:
            image.locks.release(held)

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        if flags and flags & RequestFlags.WRITE_COMPRESSED:
            await self._write_compressed(offset, view)
            return
        image = self.image
        first, last = offset >> self._bits, (offset + len(view) - 1) >> self._bits
        held = image.locks.try_shared(first, last) or await image.locks.shared(first, last)
        try:
            if await image.guest_writer.write_in_place(offset, view):
                return
            if image.locks.try_upgrade(held):
                await image.guest_writer.write(offset, view)
                return
        finally:
            image.locks.release(held)
        held = await image.locks.exclusive(first, last)
        try:
            await image.guest_writer.write(offset, view)
        finally:
            image.locks.release(held)

    async def _write_compressed(self, offset: int, view: memoryview) -> None:
        image = self.image
        if image.data_file is not None:
            raise io_error(errno.ENOTSUP, f"{image.name}: compressed writes to a data file")
        image.compressor.check(offset, len(view))
        first, last = offset >> self._bits, (offset + len(view) - 1) >> self._bits
        held = await image.locks.exclusive(first, last)
        try:
            await image.compressor.write(offset, view)
        finally:
            image.locks.release(held)

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        image = self.image
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        held = await image.locks.exclusive(first, last)
        try:
            may_unmap = bool(flags & RequestFlags.MAY_UNMAP)
            await image.eraser.zero(offset, length, may_unmap=may_unmap)
        finally:
            image.locks.release(held)

    async def pdiscard(self, offset: int, length: int) -> None:
        image = self.image
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        held = await image.locks.exclusive(first, last)
        try:
            await image.eraser.discard(offset, length)
        finally:
            image.locks.release(held)

    async def flush(self) -> None:
        await self.image.flush()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return await status.block_status(self.image, offset, length)

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        return await status_walk.status_runs(self.image, offset, length, runs_max=runs_max)

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        await self._bitmaps_resizing(length)
        async with self._map_slot.shut():
            self.image.reader.direct_map = None
            await resize.resize(self.image, length, preallocation=preallocation)

    # --- snapshots ---

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, in the table's order. Context: any thread."""
        return self.image.header_file.snapshots.entries

    async def snapshot_create(self, name: str) -> None:
        async with self._alone("snapshots"):
            now_ns = self.node.ctx.now_ns(ClockType.HOST)
            await snapshot.create(self.image, name, now_ns=now_ns)

    async def snapshot_apply(self, id_or_name: str) -> None:
        if self.node.dirty_bitmaps:
            raise ImageError(
                self.image.name,
                "has dirty bitmaps, which wouldn't know what differs in another snapshot",
            )
        async with self._alone("snapshots"):
            table = self.image.header_file.snapshots
            await snapshot.go_to(self.image, self._found(id_or_name, table.find(id_or_name)))

    async def snapshot_delete(self, name_or_id: str) -> None:
        async with self._alone("snapshots"):
            found = self.image.header_file.snapshots.find_for_deletion(name_or_id)
            await snapshot.delete(self.image, self._found(name_or_id, found))

    def _found(self, wanted: str, found: Snapshot | None) -> Snapshot:
        if found is None:
            raise ImageError(self.image.name, f"there is no snapshot '{wanted}'")
        return found

    @asynccontextmanager
    async def _alone(self, what: str) -> AsyncIterator[None]:
        """Nobody else uses the image inside: it is drained, and what its direct map says is about
        to change. `what` of the image is to be changed."""
        image = self.image
        if self.node.read_only:
            raise ImageError(image.name, f"its {what} can't be changed: it is open read-only")
        if image.data_file is not None and what == "snapshots":
            raise ImageError(image.name, "has an external data file, so it can't have snapshots")
        async with DrainedSection(self.node), self._map_slot.shut():
            image.reader.direct_map = None
            held = await image.locks.exclusive(0, GUEST_CLUSTER_MAX)
            try:
                async with image.mutex:
                    yield
                    await image.overlaps.places.read_inactive()
            finally:
                image.locks.release(held)

    # --- dirty bitmaps ---

    async def _open_bitmaps(self) -> None:
        if not self._writable:
            return
        try:
            async with self.image.mutex:
                await self.bitmaps.open()
        except OSError as error:
            raise ImageError.from_os_error(self.image.name, error) from error

    async def _bitmaps_resizing(self, length: int) -> None:
        bitmaps = self.node.dirty_bitmaps.values()
        if not length and any(bitmap.persistent for bitmap in bitmaps):
            raise io_error(errno.ENOTSUP, f"{self.image.name}: 0 bytes can't have stored bitmaps")
        broken = next((bitmap for bitmap in bitmaps if bitmap.inconsistent), None)
        if broken is not None:
            reason = f"can't be resized while its bitmap '{broken.name}' is inconsistent: remove it"
            raise io_error(errno.ENOTSUP, f"{self.image.name}: {reason}")
        await self.bitmaps_changing(bitmaps)

    @property
    def supports_bitmaps(self) -> bool:
        return self.image.header.version >= 3

    @property
    def stored_bitmaps(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.bitmaps.directory.entries)

    def prepare_bitmap(self, name: str, granularity: int) -> None:
        self.bitmaps.prepare_new(name, granularity)

    async def load_bitmap(self, name: str) -> DirtyBitmap | None:
        try:
            return await self.bitmaps.load(name)
        except OSError as error:
            raise ImageError.from_os_error(self.image.name, error) from error

    async def bitmaps_changing(self, bitmaps: Collection[DirtyBitmap]) -> None:
        async with self.image.mutex:
            await self.bitmaps.changing(bitmaps)

    async def remove_stored_bitmap(self, name: str) -> None:
        async with self._alone("bitmaps"):
            await self.bitmaps.remove(name)

    async def store_bitmaps(self) -> None:
        async with self._alone("bitmaps"):
            await self.bitmaps.store()
            self.node.refuse_writes(f"{self.image.name} is being closed")

    async def change_backing_file(self, filename: str | None, fmt: str | None) -> None:
        await self.image.flush()  # what the new chain doesn't show must be here by then
        await self.image.header_file.set_backing(filename, fmt)

    async def make_empty(self) -> None:
        image = self.image
        clusters = div_up(self.length_bytes, self.cluster_size)
        if clusters:
            held = await image.locks.exclusive(0, clusters - 1)
            try:
                await image.eraser.forget(0, clusters)
            finally:
                image.locks.release(held)
        await image.flush()

    # --- life ---

    def _take_share(self, share: Share) -> int:
        """Completes the share, and says how to measure its parts. Returns the map's pages."""
        image = self.image
        pages = min(PAGES_MAX, max(1, div_up(self.length_bytes, self.cluster_size)))
        map_bytes = share.reserve(
            "direct-map", pages * PAGE_BYTES, least_bytes=MAP_PAGES_MIN * PAGE_BYTES
        )
        share.reserve("root-tables", image.root_bytes, least_bytes=image.root_bytes)
        parts = share.parts
        parts[L2_CACHE].used = lambda: image.l2.bytes_used
        parts[REFCOUNT_CACHE].used = lambda: image.blocks.bytes_used
        parts["direct-map"].used = lambda: len(self._map_slot.map or ()) * PAGE_BYTES
        parts["root-tables"].used = lambda: image.root_bytes
        return map_bytes // PAGE_BYTES

    async def _refuse_writes(self) -> None:
        """The image is being marked corrupt. Suspends: until no write goes past us any more."""
        self.node.refuse_writes(f"{self.image.name} is marked corrupt")
        self.image.reader.maps_writes = False
        await self.drop_direct_map()

    async def close(self) -> None:
        self.metadata_share.release()
        await self.drop_direct_map()
        if not self._writable or self.image.mark.is_set:
            return
        try:
            if not self.node.read_only:
                await self._store_at_close()
            await self.image.close()
        except OSError as error:
            log.error("%s: not everything could be written at close: %s", self.image.name, error)

    async def _store_at_close(self) -> None:
        try:
            async with self.image.mutex:
                await self.bitmaps.store()
        except (ImageError, OSError) as error:
            log.error("%s: its bitmaps could not be stored: %s", self.image.name, error)

    def direct_map(self) -> DirectMap | None:
        return self._map_slot.get()

    async def drop_direct_map(self) -> None:
        await self._map_slot.drop()
        self.image.reader.direct_map = self._map_slot.map

    def _make_map(self) -> tuple[DirectMap, BlockDriverState] | None:
        data = self.image.data
        host = data.mapped_file
        if host is None or self.cluster_size < host.request_alignment:
            return None
        made = DirectMap(
            host, page_bits=self._bits, length=self.length_bytes, pages_max=self._pages_max
        )
        self.image.reader.direct_map = made
        self.image.reader.maps_writes = self.node.maps_writes and data.node.maps_writes
        return made, data.node

    def info(self) -> dict[str, Any]:
        header = self.image.header
        data: dict[str, Any] = {
            "compat": "1.1" if header.version == 3 else "0.10",
            "compression-type": TYPE_NAMES[header.compression_type],
            "refcount-bits": self.image.layout.refcount_bits,
        }
        if header.version == 3:
            if header.data_file is not None:
                data["data-file"] = header.data_file
            if header.has_data_file:
                data["data-file-raw"] = header.data_file_is_raw
            data["lazy-refcounts"] = bool(header.compatible_features & LAZY_REFCOUNTS)
            if bitmaps := self.bitmaps.facts():
                data["bitmaps"] = bitmaps
            data["corrupt"] = bool(header.incompatible_features & CORRUPT)
            data["extended-l2"] = self.image.layout.extended_l2
        encryption = self.image.encryption
        if encryption is not None:
            data["encrypt"] = encryption.describe()
        found: dict[str, Any] = {
            "cluster-size": self.cluster_size,
            "dirty-flag": bool(header.incompatible_features & DIRTY),
            "format-specific": {"type": "qcow2", "data": data},
        }
        if encryption is not None:
            found["encrypted"] = True
        if self.snapshots:
            found["snapshots"] = [_snapshot_facts(entry) for entry in self.snapshots]
        if header.backing_file is not None:
            found["backing-filename"] = header.backing_file
            if header.backing_format is not None:
                found["backing-filename-format"] = header.backing_format
        return found


async def _read_snapshots(name: str, header: Header, file: BdrvChild) -> SnapshotTable:
    check_tables(name, header, file_bytes=file.length_bytes)
    try:
        return await read_table(name, header, file.preadv, file_bytes=file.length_bytes)
    except OSError as error:
        raise ImageError.from_os_error(name, error) from error


async def _read_bitmaps(name: str, image: Image) -> BitmapDirectory:
    file = image.file
    try:
        return await read_directory(name, image.header, file.read, file_bytes=file.length)
    except OSError as error:
        raise ImageError.from_os_error(name, error) from error


def _choose_snapshot(
    name: str,
    header: Header,
    snapshots: SnapshotTable,
    file: BdrvChild,
    node: Any,
    options: dict[str, Any],
) -> None:
    """With the option `snapshot`, make the header in memory describe that one's disk."""
    wanted = take_str(name, options, "snapshot", None)
    if wanted is None:
        return
    if header.has_data_file:
        raise ImageError(name, "has an external data file, so it can't have snapshots")
    if not node.read_only:
        raise ImageError(name, f"snapshot '{wanted}' can only be opened read-only")
    found = snapshots.find(wanted)
    if found is None:
        raise ImageError(name, f"there is no snapshot '{wanted}'")
    found.check_l1(name, header, file_bytes=file.length_bytes)
    header.l1_table_offset = found.l1_table_offset
    header.l1_size = found.l1_size
    header.size = found.disk_size


def _snapshot_facts(entry: Snapshot) -> dict[str, Any]:
    """SnapshotInfo, under QEMU's names."""
    seconds, nanoseconds = divmod(entry.vm_clock_nsec, snapshot.NS_PER_S)
    facts: dict[str, Any] = {
        "id": entry.id,
        "name": entry.name,
        "vm-state-size": entry.vm_state_size,
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if entry.icount is not None:
        facts["icount"] = entry.icount
    return facts


async def _open_encryption(
    name: str,
    header: Header,
    file: BdrvChild,
    node: Any,
    options: dict[str, Any],
    opener: Opener,
) -> Encryption | None:
    """Raises: ImageError."""
    if not header.crypt_method and not any(key.startswith("encrypt") for key in options):
        return None
    from blockemu.drivers.qcow2.encryption import open_encryption

    check_tables(name, header, file_bytes=file.length_bytes)
    try:
        return await open_encryption(name, header, file, node=node, options=options, opener=opener)
    except OSError as error:
        raise ImageError.from_os_error(name, error) from error


async def _open_backing(
    name: str, header: Header, node: Any, options: dict[str, Any], opener: Opener
) -> BdrvChild | None:
    """The backing child: as the options say, or else as the header does. Raises: ImageError."""
    extra = take_dict(name, options, "backing") if _is_partial(options) else None
    if "backing" in options:
        given = options.pop("backing")
        if given is None:
            return None
        if isinstance(given, dict):
            given.setdefault("read-only", True)
        return await opener.open_child(
            node,
            "backing",
            given,
            role=Role.BACKING,
            perm=Permission.CONSISTENT_READ,
            shared=Permission.ALL & ~(Permission.WRITE | Permission.RESIZE),
        )
    backing = header.backing_file
    if backing is None:
        if extra:
            raise ImageError(name, "has no backing file, so it takes no option 'backing'")
        return None
    fmt = header.backing_format
    if not fmt and not is_json(backing):
        raise ImageError(
            name,
            f"doesn't say which format its backing file '{backing}' has, and guessing isn't safe; "
            f"set it with: blockemu img rebase -u -b {backing} -F FORMAT {name}",
        )
    if fmt == "file":
        fmt = "raw"
    return await opener.open_backing(node, filename=backing, fmt=fmt or None, extra=extra)


def _is_partial(options: dict[str, Any]) -> bool:
    """What is said of the backing file only adds to what the header says: its secret, say."""
    given = options.get("backing", {})
    return isinstance(given, dict) and not given.keys() & {"driver", "file"}
