# SPDX-License-Identifier: Apache-2.0
"""Another header in the place of an image's old one, so that a power cut leaves one of the two.

The first cluster holds fixed fields, extensions and the backing file's name, back to back. A disk
writes one sector whole or not at all; so a header that differs from the old one in the first sector
only is switched by one write. A longer one isn't: half of the new name in the old one's place would
name some third file.

Then it takes two switches. The extensions and the name are first written where the old header uses
nothing, behind it. The first sector then gets the new fields, and in front of the extensions a
*filler*: an extension of a type that nobody knows, which by the specification is skipped, and which
is long enough to skip the old header's rest. That is a whole and valid header, too. Under its
cover, the header is written as it should be, and the first sector switched once more.

A cut in between leaves the image with a filler; the next rewrite takes it away.

Where a small cluster has no room for that, the feature name table is left out: it is a help for
messages, not needed. If that isn't enough, the change is refused. The alternatives were a moment
with a mixture of both headers, or one without any backing file.
"""

from __future__ import annotations

import copy
import struct
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    V2_LENGTH,
    Extension,
    Header,
)
from blockemu.drivers.qcow2.layout import BACKING_NAME_MAX, SECTOR, round_up

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image_file import ImageFile

EXTENSION_FILLER = 0x626C6B66
"""Ours: what it holds is skipped, and never kept."""

_EXTENSION = struct.Struct(">II")


def with_backing(name: str, header: Header, filename: str | None, fmt: str | None) -> Header:
    """A copy of the header that names another backing file, or none.

    All other extensions are kept, to the byte and in their order. Raises: ImageError.
    """
    length = len((filename or "").encode("utf-8", "surrogateescape"))
    if length > BACKING_NAME_MAX:
        raise ImageError(name, f"the backing file name is {length} bytes long; 1023 are allowed")
    if filename and header.data_file_is_raw:
        raise ImageError(name, "can't have a backing file: its external data file is raw")
    new = copy.copy(header)
    new.backing_file = filename or None
    new.extensions = [
        extension for extension in header.extensions if extension.kind != EXTENSION_BACKING_FORMAT
    ]
    if filename and fmt:
        new.extensions.insert(0, Extension(EXTENSION_BACKING_FORMAT, fmt.encode("utf-8")))
    return new


def with_data_file(header: Header, filename: str) -> Header:
    """A copy of the header that has another name for its external data file, or, with "", none."""
    new = copy.copy(header)
    new.extensions = [
        extension for extension in header.extensions if extension.kind != EXTENSION_DATA_FILE
    ]
    if filename:
        name = filename.encode("utf-8", "surrogateescape")
        place = sum(extension.kind == EXTENSION_BACKING_FORMAT for extension in new.extensions)
        new.extensions.insert(place, Extension(EXTENSION_DATA_FILE, name))
    return new


async def rewrite(name: str, file: ImageFile, header: Header) -> None:
    """Write `header` in the place of the one in the file; it is durable when this returns.

    A power cut at any point leaves the old header or the new one, whole, and so does an error.
    Settles `backing_file_offset`. Suspends: for I/O. Raises: ImageError, before anything is
    written, when it doesn't fit; OSError.
    """
    buffer = bytearray(header.cluster_size)
    await file.read(0, memoryview(buffer))
    old = bytes(buffer)
    for cluster in _steps(name, old, header):
        await _write_changes(file, old[SECTOR:], cluster[SECTOR:], offset=SECTOR)
        await _write_changes(file, old[:SECTOR], cluster[:SECTOR], offset=0)
        old = cluster


async def _write_changes(file: ImageFile, old: bytes, new: bytes, *, offset: int) -> None:
    """The sectors of a part of the cluster that differ, durably."""
    changed = [
        start
        for start in range(0, len(new), SECTOR)
        if new[start : start + SECTOR] != old[start : start + SECTOR]
    ]
    if changed:
        start, end = changed[0], changed[-1] + SECTOR
        await file.write(offset + start, new[start:end])
        await file.flush()


def _steps(name: str, old: bytes, header: Header) -> list[bytes]:
    """What the first cluster holds after each switch."""
    header.extensions = [found for found in header.extensions if found.kind != EXTENSION_FILLER]
    steps = _plan(name, old, header)
    if steps is None:
        header.extensions = [
            found for found in header.extensions if found.kind != EXTENSION_FEATURE_NAMES
        ]
        steps = _plan(name, old, header)
    if steps is None:
        raise ImageError(
            name,
            f"its first cluster of {header.cluster_size} bytes has no room to change the header so"
            " that a power cut does no harm: take a shorter backing file name",
        )
    return steps


def _plan(name: str, old: bytes, header: Header) -> list[bytes] | None:
    """As `_steps`; None, if that takes room which isn't there. Raises: ImageError: never fits."""
    size = header.cluster_size
    try:
        new = header.serialise(name)
    except ImageError:
        if header.extension(EXTENSION_FEATURE_NAMES) is not None:
            return None
        raise
    used = _used_bytes(old)
    target = new.ljust(size, b"\0")
    at_once = new + old[len(new) :]
    if at_once[SECTOR:used] == old[SECTOR:used]:  # what the old header uses stays until the switch
        return [at_once, target]
    length = V2_LENGTH if header.version == 2 else header.header_length
    start = round_up(max(used, len(new), SECTOR), 8)
    rest = new[length:]
    if length + _EXTENSION.size > SECTOR or start + len(rest) > size:
        return None
    detour = bytearray(old)
    detour[start : start + len(rest)] = rest
    moved = copy.copy(header)
    if moved.backing_file is not None:
        moved.backing_file_offset += start - length
    filler = _EXTENSION.pack(EXTENSION_FILLER, start - length - _EXTENSION.size)
    detour[: length + len(filler)] = moved.fixed_fields() + filler
    cover = bytearray(target)
    cover[start : start + len(rest)] = rest  # the detour's, until the switch away from it
    return [bytes(detour), bytes(cover), target]


def _used_bytes(cluster: bytes) -> int:
    """Where the header in the first cluster ends, or what it names in it."""
    version, name_offset, name_length = struct.unpack_from(">IQI", cluster, 4)
    position = V2_LENGTH if version == 2 else struct.unpack_from(">I", cluster, 100)[0]
    end = min(name_offset or len(cluster), len(cluster))
    while position + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(cluster, position)
        position += _EXTENSION.size
        if not kind:
            break
        position += round_up(length, 8)
    return max(min(position, len(cluster)), name_offset + name_length if name_offset else 0)
