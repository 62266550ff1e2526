# SPDX-License-Identifier: Apache-2.0
"""Changing what an image is: its version, its header's options.

Version 2 has less: no zero clusters, no feature bits, refcounts of 16 bits only (specification:
Header, and L2 table entries). So an image on its way there first gets rid of its zero clusters, all
of them while it is of version 3 still, where either form is right. Without a backing file,
unallocated reads as zeroes; with one, zeroes have to be written. When all that is durable, the
header is switched, as one (header_rewrite.py). A crash leaves an image of one version or the other.

The way up is the header alone: every table of version 2 is one of version 3.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_bool, take_choice, take_size, take_str
from blockemu.drivers.qcow2.bitmap_directory import AUTOCLEAR_BITMAPS
from blockemu.drivers.qcow2.cluster_map import Kind
from blockemu.drivers.qcow2.features import LAZY_REFCOUNTS, RAW_DATA, feature_names, name_table
from blockemu.drivers.qcow2.header import (
    EXTENSION_BITMAPS,
    EXTENSION_FEATURE_NAMES,
    SIZE_MAX,
    V2_LENGTH,
    V3_LENGTH,
    V3_LENGTH_MIN,
    Extension,
    Header,
)
from blockemu.drivers.qcow2.header_rewrite import with_backing, with_data_file
from blockemu.drivers.qcow2.layout import SECTOR, div_up, round_up

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image

AMENDABLE: Final = (
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
    "size",
)
"""Creation options that an image can be given later."""

ZEROES_AT_ONCE: Final = 1024 * 1024
"""Bytes of zeroes written at once: bounds the buffer."""

REFCOUNT_BITS: Final = (1, 2, 4, 8, 16, 32, 64)
_V2_REFCOUNT_ORDER: Final = 4
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """What is to change; None: stays. `backing_file` "" is none, and so is `data_file` "": whoever
    opens the image then has to name it. `refcount_bits` isn't the header's alone: refcount_bits.py
    sees to it."""

    version: int | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    size_bytes: int | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None

    @classmethod
    def parse(cls, name: str, options: Mapping[str, Any]) -> Amendment:
        """From options under qemu-img's names. Raises: ImageError."""
        for key in options:
            if key not in AMENDABLE:
                raise ImageError(name, f"option '{key}' is for new images only")
        given = dict(options)
        version = None
        if "compat" in given:
            version = _VERSIONS[take_choice(name, given, "compat", tuple(_VERSIONS), "1.1")]
        lazy = None
        if "lazy_refcounts" in given:
            lazy = take_bool(name, given, "lazy_refcounts", default=False)
        bits = take_size(name, given, "refcount_bits", None)
        if bits is not None and bits not in REFCOUNT_BITS:
            raise ImageError(
                name, f"refcount_bits is a power of two up to {max(REFCOUNT_BITS)}, not {bits}"
            )
        size_bytes = take_size(name, given, "size", None)
        if size_bytes is not None:
            size_bytes = round_up(size_bytes, SECTOR)
            if size_bytes > SIZE_MAX:
                raise ImageError(name, f"a virtual size of {size_bytes} bytes is not possible")
        return cls(
            version=version,
            lazy_refcounts=lazy,
            refcount_bits=bits,
            size_bytes=size_bytes,
            backing_file=take_str(name, given, "backing_file", None),
            backing_fmt=take_str(name, given, "backing_fmt", None),
            data_file=take_str(name, given, "data_file", None),
            data_file_raw=(
                take_bool(name, given, "data_file_raw", default=False)
                if "data_file_raw" in given
                else None
            ),
        )

    def check(self, name: str, header: Header) -> None:
        """Refuse what this image can't become, before anything is done. Raises: ImageError."""
        version = self.version or header.version
        if version == 2 and self.lazy_refcounts:
            raise ImageError(name, "lazy_refcounts=on takes version 3 (compat=1.1)")
        if version == 2 and self.refcount_bits not in (None, 1 << _V2_REFCOUNT_ORDER):
            bits = self.refcount_bits
            raise ImageError(name, f"refcounts of {bits} bits take version 3 (compat=1.1)")
        if version == 2 and header.version == 3:
            _check_downgrade(name, header)
        if self.size_bytes is not None and self.size_bytes < header.size:
            raise ImageError(name, f"has {header.size} bytes and can't be made smaller by amend")
        if self.backing_file and not (self.backing_fmt or header.backing_format):
            raise ImageError(name, "the backing file's format must be given (backing_fmt=)")
        if self.backing_fmt and not self.backing_in(header):
            raise ImageError(name, "a backing format without a backing file")
        if self.data_file is not None and not header.has_data_file:
            raise ImageError(name, "has no external data file, so data_file can't be changed")
        if self.data_file_raw and not header.data_file_is_raw:
            raise ImageError(name, "data_file_raw=on is for new images only")
        self.apply(name, copy.copy(header)).serialise(name)  # raises, if it never fits

    def backing_in(self, header: Header) -> str | None:
        """The backing file's name when all is done."""
        wanted = header.backing_file if self.backing_file is None else self.backing_file
        return wanted or None

    def apply(self, name: str, header: Header) -> Header:
        """A copy of the header with all that is asked for, the size excepted. Raises: ImageError,
        for a name that is too long."""
        fmt = self.backing_fmt or header.backing_format
        if self.backing_file is None and self.backing_fmt is None:
            new = copy.copy(header)
        else:
            new = with_backing(name, header, self.backing_in(header), fmt)
        if self.version == 2 and header.version == 3:
            _to_version_2(new)
        elif self.version == 3 and header.version == 2:
            _to_version_3(new)
        if self.lazy_refcounts is not None and new.version == 3:
            new.compatible_features &= ~LAZY_REFCOUNTS
            new.compatible_features |= LAZY_REFCOUNTS if self.lazy_refcounts else 0
        if self.data_file is not None:
            new = with_data_file(new, self.data_file)
        if self.data_file_raw is False:
            new.autoclear_features &= ~RAW_DATA
        return new


def _check_downgrade(name: str, header: Header) -> None:
    lacks = None
    if header.refcount_order != _V2_REFCOUNT_ORDER:
        lacks = f"refcounts of {1 << header.refcount_order} bits, only of 16"
    elif header.incompatible_features:
        table = header.extension(EXTENSION_FEATURE_NAMES) or b""
        lacks = ", ".join(feature_names(header.incompatible_features, table))
    elif header.autoclear_features & AUTOCLEAR_BITMAPS:
        lacks = "bitmaps"
    if lacks is not None:
        raise ImageError(name, f"can't become version 2 (compat=0.10), which has no {lacks}")
    if header.nb_snapshots:
        raise ImageError(
            name, "can't become version 2 (compat=0.10) while it has internal snapshots"
        )


def _to_version_2(header: Header) -> None:
    header.version = 2
    header.header_length, header.additional = V2_LENGTH, b""
    header.compatible_features = header.autoclear_features = 0
    header.extensions = [
        found
        for found in header.extensions
        if found.kind not in (EXTENSION_FEATURE_NAMES, EXTENSION_BITMAPS)
    ]


def _to_version_3(header: Header) -> None:
    header.version = 3
    header.header_length = V3_LENGTH
    header.additional = bytes(V3_LENGTH - V3_LENGTH_MIN)
    header.refcount_order = _V2_REFCOUNT_ORDER
    names = Extension(EXTENSION_FEATURE_NAMES, name_table())
    backing_bytes = len((header.backing_file or "").encode("utf-8", "surrogateescape"))
    others = sum(8 + round_up(len(found.data), 8) for found in header.extensions)
    if V3_LENGTH + 16 + len(names.data) + others + backing_bytes <= header.cluster_size:
        header.extensions = [*header.extensions, names]


async def replace_zeroes(image: Image, offset: int, length: int, *, write: bool) -> int:
    """See to zero clusters at `offset` (a cluster's start) and behind; returns for how many bytes.

    `write`: there is or will be a backing file, so that zeroes must be written.
    Suspends: for I/O. Raises: OSError.
    """
    bits, size = image.layout.cluster_bits, image.layout.cluster_size
    extent = await image.clusters.resolve(offset, length)
    if extent.kind not in (Kind.ZERO, Kind.ZERO_ALLOCATED):
        return extent.length
    first = offset >> bits
    count = extent.length
    if write:
        count = min(count, max(ZEROES_AT_ONCE, size))
    last = div_up(offset + count, size)
    held = await image.locks.exclusive(first, last - 1)
    try:
        if write:
            await image.guest_writer.write(offset, memoryview(bytes(count)))
        else:
            await image.eraser.forget(first, last)
    finally:
        image.locks.release(held)
    return count
