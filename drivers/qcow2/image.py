# SPDX-License-Identifier: Apache-2.0
"""An open image: all the parts of this folder, put together over one file.

Who needs whom, bottom up: `file` (image_file.py), and through it `data` (guest_data.py); the
caches and root tables; the metadata writer, which writes them back in order; the refcounts; the
cluster map; and on top those that do the guest's work: reader, writers (plain, compressed), eraser.
`locks` keeps guest clusters apart, `mutex` the metadata: whoever allocates, creates or copies a
table holds it.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.bitmap_directory import AUTOCLEAR_BITMAPS
from blockemu.drivers.qcow2.cluster_lock import ClusterLocks
from blockemu.drivers.qcow2.cluster_map import ClusterMap
from blockemu.drivers.qcow2.compression import compressor, decompressor
from blockemu.drivers.qcow2.corrupt_mark import CorruptMark
from blockemu.drivers.qcow2.damage import DamageLog
from blockemu.drivers.qcow2.data_file import ClosedDataFile, DataFile
from blockemu.drivers.qcow2.features import DIRTY, RAW_DATA
from blockemu.drivers.qcow2.guest_compress import GuestCompressor
from blockemu.drivers.qcow2.guest_data import GuestData
from blockemu.drivers.qcow2.guest_erase import GuestEraser
from blockemu.drivers.qcow2.guest_parts import guest_parts
from blockemu.drivers.qcow2.guest_read import GuestReader
from blockemu.drivers.qcow2.guest_write import GuestWriter
from blockemu.drivers.qcow2.header import (
    EXTENSION_BITMAPS,
    Header,
    check_tables,
    check_writable,
)
from blockemu.drivers.qcow2.header_file import HeaderFile
from blockemu.drivers.qcow2.image_file import ImageFile
from blockemu.drivers.qcow2.layout import Layout
from blockemu.drivers.qcow2.metadata_places import MetadataPlaces
from blockemu.drivers.qcow2.metadata_writer import MetadataWriter
from blockemu.drivers.qcow2.overlap_check import OverlapCheck
from blockemu.drivers.qcow2.packed_space import PackedSpace
from blockemu.drivers.qcow2.refcount import Refcounts
from blockemu.drivers.qcow2.refcount_width import RefcountWidth
from blockemu.drivers.qcow2.repair import repair_dirty
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES, RootTable
from blockemu.drivers.qcow2.shown_slices import ShownSlices
from blockemu.drivers.qcow2.table_cache import TableCache, words_from
from blockemu.loop.sync import Mutex

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.qcow2.encryption import Encryption
    from blockemu.drivers.qcow2.options import Options
    from blockemu.loop.buffers import BufferPool


L2_AHEAD_BYTES = 64 * 1024
"""Of an L2 table, read at once while the cache has room: costs little more than a slice of it."""


@dataclass(slots=True)
class Image:
    """The parts. Context: home thread of the node's AioContext."""

    name: str
    layout: Layout
    file: ImageFile
    data: GuestData
    header_file: HeaderFile
    l1: RootTable
    l2: TableCache
    reftable: RootTable
    blocks: TableCache
    writer: MetadataWriter
    refcounts: Refcounts
    clusters: ClusterMap
    reader: GuestReader
    guest_writer: GuestWriter
    eraser: GuestEraser
    compressor: GuestCompressor
    locks: ClusterLocks
    mutex: Mutex
    mark: CorruptMark
    overlaps: OverlapCheck
    damage: DamageLog
    encryption: Encryption | None = None
    data_file: DataFile | None = None
    """The file that `data` is in, if that is not `file`."""
    preallocated: bool | None = None
    """Clusters may be holes in the file (preallocation.py); None until somebody asks."""

    @property
    def header(self) -> Header:
        return self.header_file.header

    @property
    def root_bytes(self) -> int:
        """Memory of the tables that are kept whole."""
        return (len(self.l1) + len(self.reftable)) * ENTRY_BYTES

    async def flush(self) -> None:
        """All completed writes are durable when this returns; space let go of is free again.

        Raises: OSError: of the host, or because the image is marked corrupt and something is left
        that can't be written any more.
        """
        if self.mark.is_done and not self.writer.is_dirty:
            if self.data_file is not None:
                await self.data_file.flush()
            await self.file.flush()
            return
        await self.writer.flush()
        if self.writer.released:
            async with self.mutex:
                await self.refcounts.apply_released()

    async def close(self) -> None:
        """Write everything, leak nothing, cut the file behind what is used. Raises: OSError."""
        await self.flush()
        while self.writer.is_dirty:
            await self.flush()
        await self.file.trim(self.refcounts.used_end << self.layout.cluster_bits)


async def open_image(
    name: str,
    header: Header,
    child: BdrvChild,
    *,
    read_only: bool,
    options: Options,
    buffers: Callable[[], BufferPool],
    data_child: BdrvChild | None = None,
    encryption: Encryption | None = None,
) -> Image:
    """Judge and read the root tables, and put the parts together. Raises: ImageError.

    An image that wasn't closed (DIRTY) is repaired first, if it is to be written.
    """
    layout = header.layout
    file = ImageFile(child, cluster_size=layout.cluster_size, name=name)
    if not read_only:
        check_writable(name, header)
        if header.incompatible_features & DIRTY:
            await repair_dirty(name, header, file)
    check_tables(name, header, file_bytes=file.length)
    try:
        l1 = await _read_root(file, header.l1_table_offset, header.l1_size)
        reftable = await _read_root(
            file,
            header.refcount_table_offset,
            (header.refcount_table_clusters << layout.cluster_bits) // ENTRY_BYTES,
        )
        data_file = None
        if data_child is not None:
            data_file = DataFile(data_child, header=header, name=name)
        image = _assemble(name, header, file, data_file, l1, reftable, options, buffers, encryption)
        if not read_only:
            known = RAW_DATA if header.has_data_file else 0
            if header.extension(EXTENSION_BITMAPS) is not None:
                known |= AUTOCLEAR_BITMAPS
            await image.header_file.keep_autoclear(known)
    except OSError as error:
        raise ImageError.from_os_error(name, error) from error
    return image


async def _read_root(file: ImageFile, offset: int, entries: int) -> RootTable:
    data = bytearray(entries * ENTRY_BYTES)
    if data:
        await file.read(offset, memoryview(data))
    words: array[int] = words_from("Q", data)
    return RootTable(words, offset=offset, granule=min(file.granule, file.cluster_size))


def _assemble(
    name: str,
    header: Header,
    file: ImageFile,
    data_file: DataFile | None,
    l1: RootTable,
    reftable: RootTable,
    options: Options,
    buffers: Callable[[], BufferPool],
    encryption: Encryption | None,
) -> Image:
    layout = header.layout
    damage = DamageLog(name)
    header_file = HeaderFile(header, file)
    writer = MetadataWriter(file)
    mark = CorruptMark(name, header=header_file, writer=writer)
    width = RefcountWidth(layout.refcount_order)
    blocks = TableCache(
        file, typecode=width.typecode, slice_bytes=options.slice_bytes,
        bytes_max=options.refcount_cache_bytes, write_back=writer.write_back,
    )  # fmt: skip
    kinds = guest_parts(header, has_data=data_file is not None)
    l2 = kinds.l2_cache(
        file, typecode="Q", slice_bytes=options.l2_slice_bytes,
        bytes_max=options.l2_cache_bytes, write_back=writer.write_back,
        ahead_bytes=min(layout.cluster_size, L2_AHEAD_BYTES),
    )  # fmt: skip
    writer.attach(blocks=blocks, reftable=reftable, l2=l2, l1=l1)
    places = MetadataPlaces(
        layout, file=file, header=header_file, writer=writer, kinds=options.overlap_checks
    )
    overlaps = OverlapCheck(places, cluster_bits=layout.cluster_bits, damage=damage, mark=mark)
    refcounts = Refcounts(
        layout, file=file, cache=blocks, table=reftable, width=width, writer=writer,
        header=header_file, damage=damage, mark=mark, overlaps=overlaps,
        pass_discard=options.pass_discard,
    )  # fmt: skip
    clusters = kinds.clusters(
        layout, file=file, l1=l1, l2=l2, refcounts=refcounts, writer=writer, overlaps=overlaps,
        damage=damage,
    )  # fmt: skip
    mutex = Mutex()
    data = _guest_data(header, file, data_file, writer, overlaps)
    if encryption is not None:
        data = encryption.guest_data(file, overlaps, buffers)
    reader = kinds.reader(
        layout, file=file, data=data, clusters=clusters, backing=None,
        decompress=decompressor(name, header.compression_type), damage=damage,
    )  # fmt: skip
    locks = reader.locks = ClusterLocks()
    if data_file is None:
        reader.used_end = lambda: refcounts.used_end
        overlaps.is_mapped = reader.is_mapped
        if not layout.extended_l2:
            reader.shown = ShownSlices(
                clusters, cluster_bits=layout.cluster_bits, l2=l2, locks=locks,
                host_end=lambda: reader.host_end,
            )  # fmt: skip
    guest_writer = kinds.guest_writer(
        layout, data=data, clusters=clusters, refcounts=refcounts, writer=writer, reader=reader,
        mutex=mutex, buffers=buffers, disk_bytes=header.size,
    )  # fmt: skip
    make_eraser: Callable[..., GuestEraser] = kinds.eraser
    if data_file is not None:
        pass_discard = options.pass_discard
        make_eraser = partial(kinds.eraser, file=data_file, pass_discard=pass_discard)
    eraser = make_eraser(
        layout, clusters=clusters, writer=writer, reader=reader, guest_writer=guest_writer,
        mutex=mutex,
    )  # fmt: skip
    space = PackedSpace(layout, refcounts=refcounts)
    refcounts.on_freed = space.forget
    packer = GuestCompressor(
        layout, file=file, clusters=clusters, space=space, writer=writer, reader=reader,
        guest_writer=guest_writer, eraser=eraser, mutex=mutex,
        compress=compressor(name, header.compression_type),
    )  # fmt: skip
    return Image(
        name=name, layout=layout, file=file, data=data, header_file=header_file,
        l1=l1, l2=l2, reftable=reftable, blocks=blocks, writer=writer,
        refcounts=refcounts, clusters=clusters, reader=reader, guest_writer=guest_writer,
        eraser=eraser, compressor=packer, locks=locks, mutex=mutex, mark=mark,
        overlaps=overlaps, damage=damage, data_file=data_file, encryption=encryption,
        preallocated=None if data_file is None else data_file.is_raw,
    )  # fmt: skip


def _guest_data(
    header: Header,
    file: ImageFile,
    data_file: DataFile | None,
    writer: MetadataWriter,
    overlaps: OverlapCheck,
) -> GuestData:
    if not header.has_data_file:
        return GuestData(file, overlaps)
    if data_file is None:
        return ClosedDataFile(file)
    writer.attach_data_file(data_file.flush)
    return GuestData(data_file)
