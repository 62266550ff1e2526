# SPDX-License-Identifier: Apache-2.0
"""Feature bits and their names.

Layout (specification: Feature name table): 48 bytes an entry: type (0 incompatible, 1 compatible,
2 autoclear), bit number, name padded with zeroes. The table is for programs that don't know a
feature to say which one they don't know; we write it, and read it for the same end.
"""

from __future__ import annotations

from typing import Final

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
SUPPORTED: Final = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
"""Incompatible features that an image may have and be opened, at least for reading."""

LAZY_REFCOUNTS: Final = 1 << 0
"""Compatible: refcounts may be late, with DIRTY set meanwhile. Ours never are."""

RAW_DATA: Final = 1 << 1
"""Autoclear: the external data file is right as a raw image, too."""

_ENTRY_BYTES = 48
_NAME_BYTES = 46
_INCOMPATIBLE, _COMPATIBLE, _AUTOCLEAR = range(3)

_NAMES = [
    (_INCOMPATIBLE, 0, "dirty bit"),
    (_INCOMPATIBLE, 1, "corrupt bit"),
    (_INCOMPATIBLE, 2, "external data file"),
    (_INCOMPATIBLE, 3, "compression type"),
    (_INCOMPATIBLE, 4, "extended L2 entries"),
    (_COMPATIBLE, 0, "lazy refcounts"),
    (_AUTOCLEAR, 0, "bitmaps"),
    (_AUTOCLEAR, 1, "raw external data"),
]


def name_table() -> bytes:
    """The feature name table that new images carry."""
    return b"".join(
        bytes((kind, bit)) + name.encode("ascii").ljust(_NAME_BYTES, b"\0")
        for kind, bit, name in _NAMES
    )


def feature_names(bits: int, table: bytes) -> list[str]:
    """What the incompatible feature bits in `bits` are called, here or in the image's own table."""
    known = {bit: name for kind, bit, name in _NAMES if kind == _INCOMPATIBLE}
    for start in range(0, len(table) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
        kind, bit = table[start], table[start + 1]
        raw = table[start + 2 : start + _ENTRY_BYTES].rstrip(b"\0")
        name = raw.decode("utf-8", "replace")
        if kind == _INCOMPATIBLE and raw and name.isprintable():
            known.setdefault(bit, name)
    return [known.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1]
