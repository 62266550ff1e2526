# SPDX-License-Identifier: Apache-2.0
"""The snapshot table: which internal snapshots an image has, parsed, judged and written.

Layout (specification: Snapshots; big endian), an entry, padded to a multiple of 8:

    0  l1_table_offset        24 vm_clock_nsec                 40 vm_state_size, 64 bit    (extra)
    8  l1_size (entries)      32 vm_state_size, 32 bit         48 disk_size                (extra)
    12 id_size                36 extra_data_size               56 icount, all ones: none   (extra)
    14 name_size              40 extra data, id, name
    16 date_sec, 20 date_nsec

Version 3 asks for the extra data up to `disk_size`; in version 2 it may be missing, and then the
disk had the size that it has now, since such images aren't resized. `icount` is QEMU's own. Extra
data that we don't know is kept as it is when the table is written anew.

A table is never changed in place: a new one is written beside it, and the header moves on
(snapshot.py).
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.header import Header
from blockemu.drivers.qcow2.layout import L1_BYTES_MAX, SNAPSHOTS_MAX, round_up

TABLE_BYTES_MAX: Final = 64 * 1024 * 1024
"""A table of the most snapshots with a kilobyte each; QEMU's bound, too."""
EXTRA_BYTES_MAX: Final = 1024
"""Of one entry; 24 are in use. QEMU refuses more, too."""
NAME_BYTES_MAX: Final = 255
"""Of a name that we give; QEMU keeps no more."""
L1_RANGES_MAX: Final = 1024 * 1024 * 1024
"""Bytes of snapshots' L1 tables that are told apart from data whatever refcounts say."""
READ_BYTES: Final = 64 * 1024
"""A table is read in pieces of this size, so that memory is taken for what is there only."""

_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQ")
_ICOUNT = struct.Struct(">Q")
_NO_ICOUNT = 2**64 - 1

ReadInto = Callable[[int, memoryview], Awaitable[None]]
"""(file offset, view to fill)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One entry. Texts that aren't UTF-8 keep their bytes as surrogates."""

    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    disk_size: int
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    extra: bytes = b""
    """All of the extra data, as it stands in the file."""

    @property
    def icount(self) -> int | None:
        """Instructions that the guest had executed, where QEMU says so."""
        if len(self.extra) < _EXTRA.size + _ICOUNT.size:
            return None
        (icount,) = _ICOUNT.unpack_from(self.extra, _EXTRA.size)
        return None if icount == _NO_ICOUNT else int(icount)

    def serialise(self) -> bytes:
        """The entry with its padding."""
        name, own_id = _encoded(self.name), _encoded(self.id)
        extra = self.extra
        if len(extra) < _EXTRA.size:
            extra = _EXTRA.pack(self.vm_state_size, self.disk_size)
        short_state = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        entry = _ENTRY.pack(
            self.l1_table_offset, self.l1_size, len(own_id), len(name), self.date_sec,
            self.date_nsec, self.vm_clock_nsec, short_state, len(extra),
        )  # fmt: skip
        whole = entry + extra + own_id + name
        return whole + bytes(-len(whole) % 8)

    def check_l1(self, name: str, header: Header, *, file_bytes: int) -> None:
        """Refuse an L1 table that can't be this snapshot's. Raises: ImageError."""
        where = f"the L1 table of snapshot '{self.name}' at offset {self.l1_table_offset}"
        length = self.l1_size * 8
        if self.l1_table_offset % header.cluster_size:
            raise ImageError(name, f"{where} is not aligned to a cluster")
        if length > L1_BYTES_MAX:
            raise ImageError(name, f"{where} has {self.l1_size} entries; 32 MiB is the limit")
        if self.l1_table_offset + length > file_bytes:
            raise ImageError(name, f"{where} reaches past the end of the file ({file_bytes} bytes)")
        if self.l1_size < header.layout.l1_entries(self.disk_size):
            raise ImageError(
                name, f"{where} has {self.l1_size} entries, too few for {self.disk_size} bytes"
            )


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All entries, and where they stand in the file: `length` bytes at `offset`."""

    offset: int = 0
    length: int = 0
    entries: tuple[Snapshot, ...] = ()

    def find(self, id_or_name: str) -> Snapshot | None:
        """The first snapshot with this id, or else with this name."""
        return self._first_id(id_or_name) or self._first_name(id_or_name)

    def find_for_deletion(self, name_or_id: str) -> Snapshot | None:
        """The first snapshot with this name, or else with this id: what qemu-img -d deletes goes
        by the name alone, and the wrong one must not go."""
        return self._first_name(name_or_id) or self._first_id(name_or_id)

    def _first_id(self, wanted: str) -> Snapshot | None:
        return next((found for found in self.entries if found.id == wanted), None)

    def _first_name(self, wanted: str) -> Snapshot | None:
        return next((found for found in self.entries if found.name == wanted), None)

    def next_id(self) -> str:
        """One above the highest id that is a number."""
        numbers = (int(found.id) for found in self.entries if _is_number(found.id))
        return str(max(numbers, default=0) + 1)

    def l1_ranges(self, file_bytes: int) -> list[tuple[int, int]]:
        """(offset, length) of the snapshots' L1 tables, those that overlap as one; of what lies in
        the file, and L1_RANGES_MAX bytes at most."""
        merged: list[tuple[int, int]] = []
        total = end = 0
        for offset, entries in sorted((at.l1_table_offset, at.l1_size) for at in self.entries):
            stop = offset + entries * 8
            if stop > file_bytes or entries * 8 > L1_BYTES_MAX or stop <= end:
                continue
            start, end = max(offset, end), stop
            total += end - start
            if total > L1_RANGES_MAX:
                break
            merged.append((start, end - start))
        return merged


def serialise(name: str, entries: tuple[Snapshot, ...]) -> bytes:
    """The table's bytes. Raises: ImageError, when it would be too large."""
    if len(entries) > SNAPSHOTS_MAX:
        raise ImageError(name, f"an image has at most {SNAPSHOTS_MAX} snapshots")
    data = b"".join(entry.serialise() for entry in entries)
    if len(data) > TABLE_BYTES_MAX:
        raise ImageError(name, "the snapshot table would be larger than 64 MiB")
    return data


def check_name(name: str, snapshot_name: str) -> None:
    """Refuse the name for a new snapshot of the image `name`. Raises: ImageError."""
    length = len(_encoded(snapshot_name))
    if length > NAME_BYTES_MAX:
        raise ImageError(
            name, f"a snapshot's name has at most {NAME_BYTES_MAX} bytes, not {length}"
        )
    if "\0" in snapshot_name:
        raise ImageError(name, "a snapshot's name has no NUL in it")


async def read_table(
    name: str, header: Header, read: ReadInto, *, file_bytes: int
) -> SnapshotTable:
    """The table that a header names. Suspends: for I/O.

    Raises: ImageError, naming what is wrong and where; OSError of the file.
    """
    if not header.nb_snapshots:
        return SnapshotTable()
    source = _Source(name, header.snapshots_offset, read, file_bytes)
    entries: list[Snapshot] = []
    position = 0
    for number in range(header.nb_snapshots):
        fixed = await source.bytes_at(position, _ENTRY.size, number)
        (l1_offset, l1_size, id_size, name_size, date_sec, date_nsec, clock, short_state,
         extra_size) = _ENTRY.unpack(fixed)  # fmt: skip
        if extra_size > EXTRA_BYTES_MAX:
            raise source.error(position, number, f"has {extra_size} bytes of extra data; "
                               f"{EXTRA_BYTES_MAX} is the limit")  # fmt: skip
        tail = await source.bytes_at(
            position + _ENTRY.size, extra_size + id_size + name_size, number
        )
        extra = tail[:extra_size]
        vm_state, disk_size = short_state, header.size
        if extra_size >= _EXTRA.size:
            vm_state, disk_size = _EXTRA.unpack_from(extra)
        entries.append(
            Snapshot(
                id=_decoded(tail[extra_size : extra_size + id_size]),
                name=_decoded(tail[extra_size + id_size :]),
                l1_table_offset=l1_offset, l1_size=l1_size, disk_size=disk_size,
                date_sec=date_sec, date_nsec=date_nsec, vm_clock_nsec=clock,
                vm_state_size=vm_state, extra=extra,
            )
        )  # fmt: skip
        position = round_up(position + _ENTRY.size + len(tail), 8)
    return SnapshotTable(header.snapshots_offset, position, tuple(entries))


class _Source:
    """The table's bytes, read as they are asked for and no further than the file goes."""

    def __init__(self, name: str, offset: int, read: ReadInto, file_bytes: int) -> None:
        self._name = name
        self._offset = offset
        self._read = read
        self._file_bytes = file_bytes
        self._data = bytearray()

    async def bytes_at(self, position: int, length: int, number: int) -> bytes:
        """Of entry `number`. Raises: ImageError, OSError."""
        end = position + length
        if end > TABLE_BYTES_MAX:
            raise self.error(position, number, "makes the table larger than 64 MiB")
        if self._offset + end > self._file_bytes:
            raise self.error(
                position, number, f"reaches past the end of the file ({self._file_bytes} bytes)"
            )
        while len(self._data) < end:
            start = self._offset + len(self._data)
            piece = bytearray(min(READ_BYTES, self._file_bytes - start))
            await self._read(start, memoryview(piece))
            self._data += piece
        return bytes(self._data[position:end])

    def error(self, position: int, number: int, reason: str) -> ImageError:
        where = f"snapshot table entry {number} at offset {self._offset + position}"
        return ImageError(self._name, f"{where} {reason}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
