# SPDX-License-Identifier: Apache-2.0
"""The two lists of further tables that an image may have, read for the check: snapshots, bitmaps.

Only what a count of references needs: where each table is and how large it claims to be. Names are
for messages.

Layout (specification: Snapshots; Bitmaps, "Bitmap directory"; big endian), an entry each:

    snapshot                      bitmap
    0  l1_table_offset            0  bitmap_table_offset
    8  l1_size (entries)          8  bitmap_table_size (entries)
    12 length of the ID           12 flags
    14 length of the name         16 type, 17 granularity_bits, 18 name_size
    36 length of the extra data   20 extra_data_size
    40 extra data, ID, name       24 extra data, name

Entries are padded to 8 bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.bitmap_directory import AUTOCLEAR_BITMAPS, BITMAPS_MAX
from blockemu.drivers.qcow2.header import EXTENSION_BITMAPS, SNAPSHOT_ENTRY_MIN, Header
from blockemu.drivers.qcow2.layout import round_up

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.findings import Findings
    from blockemu.drivers.qcow2.image_file import ImageFile

SNAPSHOT_EXTRA_MIN: Final = 16
"""Extra data that version 3 demands."""
SNAPSHOT_EXTRA_MAX: Final = 1024
"""QEMU's bound on it."""

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")
_EXTENSION = struct.Struct(">IIQQ")


class ListedTable(NamedTuple):
    """A table that a list names."""

    offset: int
    entries: int
    label: str
    """For messages."""


class TableList(NamedTuple):
    """A list, and the bytes of the file that it takes itself."""

    offset: int
    length: int
    tables: list[ListedTable]


async def read_snapshots(header: Header, file: ImageFile, findings: Findings) -> TableList:
    """Raises: OSError."""
    offset = header.snapshots_offset
    tables: list[ListedTable] = []
    for number in range(header.nb_snapshots):
        label = f"snapshot table entry {number} at offset {offset:#x}"
        if offset + SNAPSHOT_ENTRY_MIN > file.length:
            findings.corruption(f"{label} is past the end of the file")
            break
        data = await _read(file, offset, _SNAPSHOT.size)
        l1_offset, l1_size, id_bytes, name_bytes, _, _, _, _, extra_bytes = _SNAPSHOT.unpack(data)
        least = SNAPSHOT_EXTRA_MIN if header.version >= 3 else 0
        if not least <= extra_bytes <= SNAPSHOT_EXTRA_MAX:
            findings.corruption(f"{label} has {extra_bytes} bytes of extra data")
        tables.append(ListedTable(l1_offset, l1_size, label))
        offset += round_up(_SNAPSHOT.size + extra_bytes + id_bytes + name_bytes, 8)
    start = header.snapshots_offset
    return TableList(start, min(offset, file.length) - start if tables else 0, tables)


async def read_bitmaps(
    name: str, header: Header, file: ImageFile, findings: Findings
) -> TableList | None:
    """The bitmap directory; None where there is none that is valid.

    Raises: ImageError for an extension that can't be one; OSError.
    """
    data = header.extension(EXTENSION_BITMAPS)
    if data is None or not header.autoclear_features & AUTOCLEAR_BITMAPS:
        return None
    if len(data) != _EXTENSION.size:
        raise ImageError(name, f"the bitmaps extension is {len(data)} bytes long; 24 are expected")
    bitmaps, _, length, start = _EXTENSION.unpack(data)
    if not 1 <= bitmaps <= BITMAPS_MAX or start % header.cluster_size:
        raise ImageError(name, f"{bitmaps} bitmaps in a directory at offset {start}: not possible")
    found = TableList(start, length, [])
    offset, end = start, min(start + length, file.length)
    for number in range(bitmaps):
        label = f"bitmap directory entry {number} at offset {offset:#x}"
        size = _BITMAP.size
        if offset + size <= end:
            table, entries, _, _, _, name_bytes, extra = _BITMAP.unpack(
                await _read(file, offset, size)
            )
            size = round_up(size + name_bytes + extra, 8)
        if offset + size > end:
            findings.corruption(f"{label} reaches past the directory's end at {end:#x}")
            findings.check_error("the bitmap directory can't be followed to its end")
            break
        found.tables.append(ListedTable(table, entries, label))
        offset += size
    return found


async def _read(file: ImageFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    await file.read(offset, memoryview(data))
    return bytes(data)
