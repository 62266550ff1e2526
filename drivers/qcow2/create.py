# SPDX-License-Identifier: Apache-2.0
"""Writing a new image.

Layout of what is made, each part contiguous, in clusters:

    header | refcount table | refcount blocks | LUKS header | L1 table | L2 tables | data

The LUKS header exists in encrypted images only. The last two exist with preallocation only; data
then is a hole (metadata), allocated by the host (falloc) or written (full). With an external data
file, the data part is that file; if it is raw, the L2 tables exist without preallocation, too. In
an encrypted image, where a hole isn't zeroes to the guest, preallocated clusters are marked as
zeroes. Everything counts 1. The header comes last, so that a creation that was cut short leaves no
image.

With extended L2 entries, preallocated clusters have their host cluster and no subcluster in it yet,
as QEMU makes them: so a backing file shows through, and a device's old bytes don't. In a raw data
file all are there, which is what data_file.py asks for.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.features import (
    COMPRESSION,
    DATA_FILE,
    EXTENDED_L2,
    LAZY_REFCOUNTS,
    RAW_DATA,
    name_table,
)
from blockemu.drivers.qcow2.header import (
    CRYPT_LUKS,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    V3_LENGTH,
    V3_LENGTH_MIN,
    CryptoArea,
    Extension,
    Header,
)
from blockemu.drivers.qcow2.layout import (
    COPIED,
    HOST_OFFSET_MAX,
    REFTABLE_BYTES_MAX,
    ZERO,
    div_up,
)
from blockemu.drivers.qcow2.refcount_width import RefcountWidth
from blockemu.drivers.qcow2.subclusters import ALL_ALLOCATED
from blockemu.drivers.qcow2.table_cache import disk_bytes

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.qcow2.create_options import CreateOptions

WRITE_BYTES = 1024 * 1024
"""Tables are made and written in pieces of about this size: bounds the memory."""


class _Plan(NamedTuple):
    """Where each part begins, in clusters, and where the last one ends."""

    blocks: int
    crypto: int
    l1: int
    l2: int
    data: int
    end: int


async def create(
    node: BlockDriverState,
    name: str,
    options: CreateOptions,
    *,
    data: BlockDriverState | None = None,
    luks_area: bytes = b"",
) -> None:
    """Make the file or device under `node` a new, empty qcow2 image.

    `data`: the node of its external data file, which exists then. `luks_area`: the LUKS header and
    key material of an encrypted one.
    What they held is lost. Suspends: for I/O. Raises: ImageError; OSError of the file.
    """
    assert (data is None) is (options.data_file is None)
    plan = _plan(options)
    size = options.layout.cluster_size
    if (plan.blocks - 1) * size > REFTABLE_BYTES_MAX or plan.end * size > HOST_OFFSET_MAX:
        raise ImageError(name, "too large to preallocate with this cluster size")
    header = _header(options, plan)
    first_cluster = header.serialise(name)
    if data is not None:
        await _make_data_file(data, options)
    await _make_room(node, name, plan, options)
    await _write_refcounts(node, options, plan)
    if luks_area:
        await _write_luks(node, luks_area, plan, options)
    if plan.l2 > plan.l1:
        await _write_l1(node, options, plan)
    if plan.data > plan.l2:
        first = plan.data if data is None else 0
        await _write_entries(
            node, plan.l2 * size, first, options, entries=div_up(options.size_bytes, size),
            table_bytes=(plan.data - plan.l2) * size, bitmap=_bitmap(options),
            flags=_data_flags(options),
        )  # fmt: skip
    await node.flush()
    await node.pwritev(0, memoryview(first_cluster + bytes(size - len(first_cluster))))
    await node.flush()


def allocated_bytes(options: CreateOptions) -> int:
    """How long the file gets when the guest has written all of its disk."""
    plain = replace(
        options, preallocation="full", data_file=None, data_file_raw=False, encryption=None
    )
    return (_plan(plain).end + _crypto_clusters(options)) * options.layout.cluster_size


def _data_flags(options: CreateOptions) -> int:
    """Of preallocated clusters. With extended L2 entries, the empty bitmap says it all."""
    is_zero = options.encryption is not None and not options.layout.extended_l2
    return COPIED | ZERO if is_zero else COPIED


def _crypto_clusters(options: CreateOptions) -> int:
    if options.encryption is None:
        return 0
    return div_up(options.encryption.payload_bytes(), options.layout.cluster_size)


def _plan(options: CreateOptions) -> _Plan:
    layout = options.layout
    size = layout.cluster_size
    l1 = div_up(layout.l1_entries(options.size_bytes) * 8, size)
    mapped = div_up(options.size_bytes, size) if options.maps_all else 0
    l2 = div_up(mapped, 1 << layout.l2_bits)
    data = mapped if options.data_file is None else 0
    crypto = _crypto_clusters(options)
    table, blocks = 1, 0
    while True:
        end = 1 + table + blocks + crypto + l1 + l2 + data
        wanted_blocks = div_up(end, layout.block_entries)
        wanted_table = max(div_up(wanted_blocks * 8, size), 1)
        if (wanted_table, wanted_blocks) == (table, blocks):
            break
        table, blocks = wanted_table, wanted_blocks
    first = 1 + table
    l1_start = first + blocks + crypto
    return _Plan(first, first + blocks, l1_start, l1_start + l1, l1_start + l1 + l2, end)


def _header(options: CreateOptions, plan: _Plan) -> Header:
    layout = options.layout
    size = layout.cluster_size
    l1_entries = layout.l1_entries(options.size_bytes)
    header = Header(
        version=layout.version,
        cluster_bits=layout.cluster_bits,
        size=options.size_bytes,
        l1_size=l1_entries,
        l1_table_offset=plan.l1 * size,
        refcount_table_offset=size,
        refcount_table_clusters=plan.blocks - 1,
        refcount_order=layout.refcount_order,
        backing_file=options.backing_file,
    )
    if options.backing_fmt is not None:
        header.extensions.append(
            Extension(EXTENSION_BACKING_FORMAT, options.backing_fmt.encode("utf-8"))
        )
    if options.encryption is not None:
        header.crypt_method = CRYPT_LUKS
        area = CryptoArea(plan.crypto * size, options.encryption.payload_bytes())
        header.extensions.append(area.extension())
    if layout.version == 3:
        _add_v3(header, options)
    return header


def _add_v3(header: Header, options: CreateOptions) -> None:
    if options.lazy_refcounts:
        header.compatible_features |= LAZY_REFCOUNTS
    if options.compression_type:
        header.incompatible_features |= COMPRESSION
        header.compression_type = options.compression_type
    if options.layout.extended_l2:
        header.incompatible_features |= EXTENDED_L2
    if options.data_file is not None:
        header.incompatible_features |= DATA_FILE
        header.autoclear_features |= RAW_DATA if options.data_file_raw else 0
        filename = options.data_file.encode("utf-8", "surrogateescape")
        header.extensions.append(Extension(EXTENSION_DATA_FILE, filename))
    header.additional = bytes((options.compression_type,)).ljust(V3_LENGTH - V3_LENGTH_MIN, b"\0")
    names = Extension(EXTENSION_FEATURE_NAMES, name_table())
    # Helpful, not needed: the smallest clusters have no room for it beside a backing file's name.
    backing_bytes = len((options.backing_file or "").encode("utf-8", "surrogateescape"))
    others = sum(16 + len(extension.data) for extension in header.extensions)
    if V3_LENGTH + 16 + len(names.data) + others + backing_bytes <= header.cluster_size:
        header.extensions.append(names)


async def _make_room(
    node: BlockDriverState, name: str, plan: _Plan, options: CreateOptions
) -> None:
    length = plan.end * options.layout.cluster_size
    host_file = node.driver.host_file
    if host_file is not None and host_file.is_block_device:
        if length > node.length_bytes:
            raise ImageError(name, f"has {node.length_bytes} bytes; the image needs {length}")
        data = plan.data * options.layout.cluster_size
        if data < length:  # a device may hold anything, and the guest would see it
            await node.pwrite_zeroes(data, length - data, RequestFlags.MAY_UNMAP)
        return
    await node.truncate(0)
    own_data = options.data_file is None
    await node.truncate(length, preallocation=_host_mode(options) if own_data else "off")


def _host_mode(options: CreateOptions) -> str:
    """What the file with the guest's data is asked for."""
    return options.preallocation if options.preallocation in ("falloc", "full") else "off"


async def _make_data_file(node: BlockDriverState, options: CreateOptions) -> None:
    """Long enough, and zeroes where the tables will show it. Raises: ImageError; OSError."""
    length = options.size_bytes
    host_file = node.driver.host_file
    if host_file is None or not host_file.is_block_device:
        await node.truncate(0)
        await node.truncate(length, preallocation=_host_mode(options))
    elif length > node.length_bytes:
        name = node.filename or node.node_name
        raise ImageError(name, f"has {node.length_bytes} bytes; the disk has {length}")
    elif options.maps_all and length:
        await node.pwrite_zeroes(0, length, RequestFlags.MAY_UNMAP)
    await node.flush()


async def _write_refcounts(node: BlockDriverState, options: CreateOptions, plan: _Plan) -> None:
    """The refcount table, and blocks that count 1 for every cluster up to the plan's end."""
    layout = options.layout
    size = layout.cluster_size
    count = plan.crypto - plan.blocks
    entries = array("Q", range(plan.blocks * size, plan.crypto * size, size))
    table = disk_bytes(entries)
    await node.pwritev(size, memoryview(table + bytes(-len(table) % size)))
    width = RefcountWidth(layout.refcount_order)
    full = _block(width, size, layout.block_entries)
    last = _block(width, size, plan.end - (count - 1) * layout.block_entries)
    at_once = max(WRITE_BYTES // size, 1)
    for block in range(0, count, at_once):
        blocks = min(at_once, count - block)
        is_last = block + blocks == count
        data = full * (blocks - 1) + (last if is_last else full)
        await node.pwritev((plan.blocks + block) * size, memoryview(data))


def _block(width: RefcountWidth, size: int, ones: int) -> bytes:
    words = array(width.typecode, bytes(size))
    width.set_ones(words, 0, ones)
    return disk_bytes(words)


async def _write_luks(
    node: BlockDriverState, area: bytes, plan: _Plan, options: CreateOptions
) -> None:
    size = options.layout.cluster_size
    await node.pwritev(plan.crypto * size, memoryview(area + bytes(-len(area) % size)))


async def _write_l1(node: BlockDriverState, options: CreateOptions, plan: _Plan) -> None:
    size = options.layout.cluster_size
    table_bytes = (plan.l2 - plan.l1) * size
    entries = plan.data - plan.l2
    await _write_entries(
        node, plan.l1 * size, plan.l2, options, entries=entries, table_bytes=table_bytes
    )


def _bitmap(options: CreateOptions) -> int | None:
    """Of each cluster's subclusters, where extended L2 entries have it."""
    if not options.layout.extended_l2:
        return None
    return ALL_ALLOCATED if options.data_file_raw else 0


async def _write_entries(
    node: BlockDriverState,
    offset: int,
    first: int,
    options: CreateOptions,
    *,
    entries: int,
    table_bytes: int,
    bitmap: int | None = None,
    flags: int = COPIED,
) -> None:
    """A table at `offset` whose `entries` name the clusters from `first` on; zeroes behind them.
    `bitmap`: the second word of each, if they have one."""
    entry_bytes = 8 if bitmap is None else 16
    bits = options.layout.cluster_bits
    for start in range(0, table_bytes, WRITE_BYTES):
        length = min(WRITE_BYTES, table_bytes - start)
        low = first + min(start // entry_bytes, entries)
        high = first + min((start + length) // entry_bytes, entries)
        words = array("Q", (cluster << bits | flags for cluster in range(low, high)))
        if bitmap is not None:
            both = array("Q", (bitmap,)) * (2 * len(words))
            both[::2] = words
            words = both
        data = disk_bytes(words)
        await node.pwritev(offset + start, memoryview(data + bytes(length - len(data))))
