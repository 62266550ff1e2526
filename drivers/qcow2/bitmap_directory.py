# SPDX-License-Identifier: Apache-2.0
"""The bitmaps that an image keeps: the header extension and the directory that it names.

Layout (specification: Bitmaps extension; Bitmaps, "Bitmap directory"; big endian):

    extension                     directory entry
    0  nb_bitmaps                 0  bitmap_table_offset
    4  reserved, 0                8  bitmap_table_size (entries)
    8  bitmap_directory_size      12 flags: 1 in_use, 2 auto, 4 extra_data_compatible
    16 bitmap_directory_offset    16 type, 17 granularity_bits, 18 name_size
                                  20 extra_data_size
                                  24 extra data, name

Entries are padded to 8 bytes. The directory is parsed as it is read, and is refused at its first
lie. The bounds are QEMU's, and one of ours: what all tables together may take (TABLES_BYTES_MAX),
since they may lie over each other, so that a small file could name any number of large ones.

Without autoclear bit 0 the extension says nothing: somebody has written to the image who doesn't
know of bitmaps.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.header import EXTENSION_BITMAPS, Extension, Header
from blockemu.drivers.qcow2.layout import div_up, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from typing import Any

    ReadInto = Callable[[int, memoryview], Coroutine[Any, Any, None]]

log = logging.getLogger(__name__)

AUTOCLEAR_BITMAPS: Final = 1 << 0
"""The bitmaps extension is consistent; without it, nobody may believe it."""

IN_USE: Final = 1 << 0
AUTO: Final = 1 << 1
EXTRA_COMPATIBLE: Final = 1 << 2

BITMAPS_MAX: Final = 65535
NAME_BYTES_MAX: Final = 1023
GRANULARITY_BITS_MIN: Final = 9
GRANULARITY_BITS_MAX: Final = 31
DIRECTORY_BYTES_MAX: Final = BITMAPS_MAX * (24 + 1000)
"""QEMU's bound on the directory: near 64 MiB."""
TABLE_ENTRIES_MAX: Final = 1 << 27
"""QEMU's bound on a bitmap table."""
BITMAP_BYTES_MAX: Final = 512 << 20
"""QEMU's bound on the bits of one bitmap."""
TABLES_BYTES_MAX: Final = 64 << 20
"""Of all tables of an image: a thousand of the largest bitmaps at 64 KiB clusters."""

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_FLAGS_AT: Final = 12
_DIRTY_TRACKING: Final = 1
_READ_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapEntry:
    """A bitmap as the directory describes it."""

    name: str
    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int
    extra: bytes = b""

    @property
    def in_use(self) -> bool:
        """It wasn't stored by whoever used it last: what it holds can't be believed."""
        return bool(self.flags & IN_USE)

    @property
    def auto(self) -> bool:
        """It records all that is written to the disk."""
        return bool(self.flags & AUTO)

    def serialise(self) -> bytes:
        """The entry's bytes, padding included."""
        name = encoded(self.name)
        fixed = _ENTRY.pack(
            self.table_offset, self.table_entries, self.flags, _DIRTY_TRACKING,
            self.granularity_bits, len(name), len(self.extra),
        )  # fmt: skip
        data = fixed + self.extra + name
        return data + bytes(-len(data) % 8)

    def check_size(self, name: str, header: Header) -> None:
        """Refuse a table that isn't the one that a disk of this size needs. Raises: ImageError."""
        wanted = table_entries(header, granularity_bits=self.granularity_bits)
        if self.table_entries != wanted:
            raise ImageError(
                name,
                f"the table of bitmap '{self.name}' at offset {self.table_offset:#x} has "
                f"{self.table_entries} entries; {wanted} is what the disk takes",
            )


@dataclass(frozen=True, slots=True)
class BitmapDirectory:
    """The directory, and the bytes of the file that it takes."""

    offset: int = 0
    length: int = 0
    entries: tuple[BitmapEntry, ...] = ()

    def find(self, name: str) -> BitmapEntry | None:
        """The entry of this name."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def flag_offsets(self) -> list[int]:
        """Where in the file the flags of each entry are."""
        found = []
        offset = self.offset
        for entry in self.entries:
            found.append(offset + _FLAGS_AT)
            offset += len(entry.serialise())
        return found

    def ranges(self) -> list[tuple[str, int, int]]:
        """What the directory and the tables take of the file: name, offset, length."""
        if not self.entries:
            return []
        tables = [
            (f"the table of bitmap '{entry.name}'", entry.table_offset, entry.table_entries * 8)
            for entry in self.entries
        ]
        return [("the bitmap directory", self.offset, self.length), *tables]


def bits_of(disk_bytes: int, *, granularity_bits: int) -> int:
    """How many bits describe a disk."""
    return (disk_bytes + (1 << granularity_bits) - 1) >> granularity_bits


def table_entries(header: Header, *, granularity_bits: int) -> int:
    """How many clusters the bits of a bitmap of this image's disk take; at least one."""
    bits = bits_of(header.size, granularity_bits=granularity_bits)
    return max(div_up(div_up(bits, 8), header.cluster_size), 1)


def space_bytes(disk_bytes: int, *, cluster_size: int, bitmaps: Iterable[tuple[str, int]]) -> int:
    """What bitmaps (name, granularity) of a disk take of an image at most, the directory
    included."""
    clusters = directory = 0
    for name, granularity in bitmaps:
        bits = div_up(disk_bytes, granularity)
        data = div_up(div_up(bits, 8), cluster_size)
        clusters += data + div_up(data * 8, cluster_size)
        directory += round_up(_ENTRY.size + len(encoded(name)), 8)
    return (clusters + div_up(directory, cluster_size)) * cluster_size


async def read_directory(
    name: str, header: Header, read: ReadInto, *, file_bytes: int
) -> BitmapDirectory:
    """The directory that a header names; an empty one, if there is none to be believed.

    Suspends: for I/O. Raises: ImageError, naming what is wrong and where; OSError of the file.
    """
    extension = header.extension(EXTENSION_BITMAPS)
    if extension is None:
        return BitmapDirectory()
    if header.version < 3 or not header.autoclear_features & AUTOCLEAR_BITMAPS:
        log.warning(
            "%s: was written by a program that knows no bitmaps: those it has are void; free their "
            "space with: blockemu img check -r leaks %s", name, name,
        )  # fmt: skip
        return BitmapDirectory()
    count, length, offset = _parse_extension(name, header, extension, file_bytes)
    source = _Source(name, offset, length, read)
    entries: list[BitmapEntry] = []
    names: set[str] = set()
    tables_bytes = 0
    for number in range(count):
        entry = await source.next_entry(number, header, file_bytes)
        if entry.name in names:
            raise source.error(number, f"is a second bitmap '{entry.name}'")
        tables_bytes += entry.table_entries * 8
        if tables_bytes > TABLES_BYTES_MAX:
            raise source.error(number, f"makes all tables larger than {TABLES_BYTES_MAX} bytes")
        names.add(entry.name)
        entries.append(entry)
        source.advance(entry)
    if source.position != length:
        raise ImageError(
            name,
            f"the bitmap directory at offset {offset:#x} has {length} bytes, but its {count} "
            f"entries take {source.position}",
        )
    return BitmapDirectory(offset, length, tuple(entries))


def _parse_extension(
    name: str, header: Header, data: bytes, file_bytes: int
) -> tuple[int, int, int]:
    if len(data) != _EXTENSION.size:
        raise ImageError(
            name, f"the bitmaps extension is {len(data)} bytes long; {_EXTENSION.size} is right"
        )
    count, reserved, length, offset = _EXTENSION.unpack(data)
    if reserved:
        raise ImageError(name, f"the bitmaps extension has reserved bytes set: {reserved:#x}")
    if not 1 <= count <= BITMAPS_MAX:
        raise ImageError(
            name, f"the bitmaps extension counts {count} bitmaps; 1 to {BITMAPS_MAX} are possible"
        )
    if not 1 <= length <= DIRECTORY_BYTES_MAX:
        raise ImageError(
            name,
            f"the bitmap directory at offset {offset:#x} has {length} bytes; "
            f"1 to {DIRECTORY_BYTES_MAX} are possible",
        )
    if offset % header.cluster_size or not offset:
        raise ImageError(
            name, f"the bitmap directory at offset {offset:#x} is not aligned to a cluster"
        )
    if offset + length > file_bytes:
        raise ImageError(
            name,
            f"the bitmap directory ({length} bytes at offset {offset:#x}) reaches past the end of "
            f"the file ({file_bytes} bytes)",
        )
    return count, length, offset


class _Source:
    """The directory's bytes, read as they are asked for."""

    def __init__(self, name: str, offset: int, length: int, read: ReadInto) -> None:
        self.position = 0
        self._name = name
        self._offset = offset
        self._length = length
        self._read = read
        self._data = b""
        self._data_at = 0

    async def next_entry(self, number: int, header: Header, file_bytes: int) -> BitmapEntry:
        """The entry at `position`. Raises: ImageError, OSError."""
        fixed = await self._bytes(number, 0, _ENTRY.size)
        table, entries, flags, kind, bits, name_bytes, extra_bytes = _ENTRY.unpack(fixed)
        if flags & ~(IN_USE | AUTO | EXTRA_COMPATIBLE):
            raise self.error(number, f"has reserved flags set: {flags:#x}")
        if kind != _DIRTY_TRACKING:
            raise self.error(number, f"is of type {kind}; only 1 (dirty tracking) is known")
        if not GRANULARITY_BITS_MIN <= bits <= GRANULARITY_BITS_MAX:
            raise self.error(number, f"has granularity_bits {bits}; 9 to 31 are supported")
        if not 1 <= name_bytes <= NAME_BYTES_MAX:
            raise self.error(number, f"has a name of {name_bytes} bytes; 1 to 1023 are possible")
        if extra_bytes and not flags & EXTRA_COMPATIBLE:
            raise self.error(number, "has extra data of a kind that is not known")
        if not table or table % header.cluster_size:
            raise self.error(number, f"has its table at {table:#x}: not aligned to a cluster")
        if not 1 <= entries <= TABLE_ENTRIES_MAX:
            raise self.error(number, f"has a table of {entries} entries")
        if entries * header.cluster_size > round_up(BITMAP_BYTES_MAX, header.cluster_size):
            raise self.error(number, "has more than 512 MiB of bits")
        if table + entries * 8 > file_bytes:
            raise self.error(
                number, f"has its table at {table:#x}, past the end of the file ({file_bytes})"
            )
        tail = await self._bytes(number, _ENTRY.size, extra_bytes + name_bytes)
        return BitmapEntry(
            name=decoded(tail[extra_bytes:]), table_offset=table, table_entries=entries,
            flags=flags, granularity_bits=bits, extra=tail[:extra_bytes],
        )  # fmt: skip

    def advance(self, entry: BitmapEntry) -> None:
        self.position += round_up(_ENTRY.size + len(entry.extra) + len(encoded(entry.name)), 8)

    async def _bytes(self, number: int, start: int, length: int) -> bytes:
        start += self.position
        end = start + length
        if end > self._length:
            raise self.error(number, f"reaches past the directory's end at {self._length} bytes")
        if start < self._data_at or end > self._data_at + len(self._data):
            piece = bytearray(min(max(length, _READ_BYTES), self._length - start))
            await self._read(self._offset + start, memoryview(piece))
            self._data, self._data_at = bytes(piece), start
        return self._data[start - self._data_at : end - self._data_at]

    def error(self, number: int, reason: str) -> ImageError:
        where = f"bitmap directory entry {number} at offset {self._offset + self.position:#x}"
        return ImageError(self._name, f"{where} {reason}")


def serialise(name: str, entries: tuple[BitmapEntry, ...]) -> bytes:
    """The directory's bytes. Raises: ImageError, when there would be too many."""
    if len(entries) > BITMAPS_MAX:
        raise ImageError(name, f"an image has at most {BITMAPS_MAX} bitmaps")
    data = b"".join(entry.serialise() for entry in entries)
    if len(data) > DIRECTORY_BYTES_MAX:
        raise ImageError(name, f"the bitmap directory would have {len(data)} bytes, too many")
    return data


def with_directory(header: Header, directory: BitmapDirectory) -> list[Extension]:
    """The header's extensions, with one that names this directory; or none, if it is empty."""
    data = _EXTENSION.pack(len(directory.entries), 0, directory.length, directory.offset)
    new = Extension(EXTENSION_BITMAPS, data)
    rest = [found for found in header.extensions if found.kind != EXTENSION_BITMAPS]
    return [*rest, new] if directory.entries else rest


def encoded(text: str) -> bytes:
    """A bitmap's name in the file."""
    return text.encode("utf-8", "surrogateescape")


def decoded(data: bytes) -> str:
    """The name that the file has."""
    return data.decode("utf-8", "surrogateescape")
