# SPDX-License-Identifier: Apache-2.0
"""The qcow2 header: parsed, judged, written.

Layout (specification: Header; big endian):

    0  magic "QFI\\xfb"        36  l1_size (entries)            72  incompatible_features   (v3)
    4  version                40  l1_table_offset              80  compatible_features
    8  backing_file_offset    48  refcount_table_offset        88  autoclear_features
    16 backing_file_size      56  refcount_table_clusters      96  refcount_order
    20 cluster_bits           60  nb_snapshots                 100 header_length
    24 size                   64  snapshots_offset             104 compression_type (length > 104)
    32 crypt_method

Behind `header_length` bytes come the header extensions: type, length, data, padding to 8; the list
ends with type 0. The backing file's name follows in what is left of the first cluster.

What we don't know is kept: additional header fields, extensions, compatible feature bits. What we
can't do is refused here by its name, and so is every table that the file can't hold.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.features import (
    CORRUPT,
    DATA_FILE,
    EXTENDED_L2,
    RAW_DATA,
    SUPPORTED,
    feature_names,
)
from blockemu.drivers.qcow2.layout import (
    BACKING_NAME_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    EXTENDED_L2_CLUSTER_BITS_MIN,
    L1_BYTES_MAX,
    REFCOUNT_ORDER_MAX,
    REFTABLE_BYTES_MAX,
    SNAPSHOTS_MAX,
    Layout,
    round_up,
)

MAGIC: Final = b"QFI\xfb"
V2_LENGTH: Final = 72
V3_LENGTH_MIN: Final = 104
V3_LENGTH: Final = 112
"""What we write: up to compression_type and its padding."""
SIZE_MAX: Final = 2**63 - 1
SNAPSHOT_ENTRY_MIN: Final = 40

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_DATA_FILE: Final = 0x44415441
EXTENSION_ENCRYPTION: Final = 0x0537BE77

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2
CRYPTO_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of an encryption header: LUKS takes 2 MiB."""

_BASE = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_CRYPTO_AREA = struct.Struct(">QQ")


class Extension(NamedTuple):
    """A header extension as it stands in the file."""

    kind: int
    data: bytes


class CryptoArea(NamedTuple):
    """Where the encryption header lies. Bytes; it takes whole clusters."""

    offset: int
    length: int

    def extension(self) -> Extension:
        """What names it in the header."""
        return Extension(EXTENSION_ENCRYPTION, _CRYPTO_AREA.pack(self.offset, self.length))


@dataclass(slots=True)
class Header:
    """The header's fields under the specification's names, and what follows them."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    crypt_method: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V3_LENGTH
    compression_type: int = 0
    additional: bytes = bytes(V3_LENGTH - V3_LENGTH_MIN)
    """Version 3: the bytes from 104 to `header_length`, compression_type included."""
    extensions: list[Extension] = field(default_factory=list)
    backing_file: str | None = None
    backing_file_offset: int = 0

    @property
    def layout(self) -> Layout:
        extended_l2 = bool(self.incompatible_features & EXTENDED_L2)
        return Layout(self.cluster_bits, self.refcount_order, self.version, extended_l2)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of this type."""
        return next((found.data for found in self.extensions if found.kind == kind), None)

    @property
    def backing_format(self) -> str | None:
        data = self.extension(EXTENSION_BACKING_FORMAT)
        return data.decode("utf-8", "replace") if data is not None else None

    @property
    def crypto_area(self) -> CryptoArea | None:
        """Where the encryption header lies, in an image that has one."""
        data = self.extension(EXTENSION_ENCRYPTION)
        if self.crypt_method != CRYPT_LUKS or data is None:
            return None
        return CryptoArea(*_CRYPTO_AREA.unpack(data))

    @property
    def has_data_file(self) -> bool:
        """The guest's clusters lie in an external data file."""
        return bool(self.incompatible_features & DATA_FILE)

    @property
    def data_file(self) -> str | None:
        """The name that the header has for it; it needn't have one."""
        data = self.extension(EXTENSION_DATA_FILE) if self.has_data_file else None
        return data.decode("utf-8", "surrogateescape") if data else None

    @property
    def data_file_is_raw(self) -> bool:
        """The data file is a raw image of the disk, and has to stay one."""
        return self.has_data_file and bool(self.autoclear_features & RAW_DATA)

    def fixed_fields(self) -> bytes:
        """The first `header_length` bytes; what changes in place while an image is open."""
        name = (self.backing_file or "").encode("utf-8", "surrogateescape")
        base = _BASE.pack(
            MAGIC, self.version, self.backing_file_offset, len(name), self.cluster_bits, self.size,
            self.crypt_method, self.l1_size, self.l1_table_offset, self.refcount_table_offset,
            self.refcount_table_clusters, self.nb_snapshots, self.snapshots_offset,
        )  # fmt: skip
        if self.version == 2:
            return base
        return base + self._v3_fields() + self.additional

    def _v3_fields(self) -> bytes:
        return _V3.pack(
            self.incompatible_features,
            self.compatible_features,
            self.autoclear_features,
            self.refcount_order,
            self.header_length,
        )

    def serialise(self, name: str) -> bytes:
        """The whole first cluster's used part; settles `backing_file_offset`.

        Raises: ImageError, when extensions and backing file name don't fit into a cluster.
        """
        if self.version == 3:
            self.header_length = V3_LENGTH_MIN + len(self.additional)
        tail = b"".join(
            _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
            for kind, data in self.extensions
        ) + _EXTENSION.pack(EXTENSION_END, 0)
        backing = (self.backing_file or "").encode("utf-8", "surrogateescape")
        length = V2_LENGTH if self.version == 2 else self.header_length
        self.backing_file_offset = length + len(tail) if backing else 0
        if length + len(tail) + len(backing) > self.cluster_size:
            raise ImageError(name, "header extensions and backing file name don't fit in a cluster")
        return self.fixed_fields() + tail + backing


def parse(name: str, data: bytes) -> Header:
    """Parse and judge the header at the start of `data`.

    `data` is the first cluster, or as much of it as the file has; `first_cluster_bytes` says how
    much to read. Raises: ImageError, naming what is wrong.
    """
    header = _parse_fields(name, data)
    _check_fields(name, header)
    length = V2_LENGTH if header.version == 2 else header.header_length
    area_end = min(len(data), header.cluster_size)
    if header.backing_file_offset:
        area_end = min(area_end, header.backing_file_offset)
    header.extensions = _parse_extensions(name, data[length:area_end])
    _check_features(name, header)
    _check_encryption(name, header)
    return header


def first_cluster_bytes(name: str, data: bytes) -> int:
    """The cluster size that the header at the start of `data` (24 bytes or more) declares."""
    if len(data) < V2_LENGTH or data[:4] != MAGIC:
        raise ImageError(name, "not a qcow2 image: no qcow2 header at its start")
    (bits,) = struct.unpack_from(">I", data, 20)
    if not CLUSTER_BITS_MIN <= bits <= CLUSTER_BITS_MAX:
        raise ImageError(
            name, f"cluster_bits is {bits}; {CLUSTER_BITS_MIN} to {CLUSTER_BITS_MAX} are supported"
        )
    return 1 << int(bits)


def _parse_fields(name: str, data: bytes) -> Header:
    first_cluster_bytes(name, data)
    (_, version, backing_offset, backing_size, cluster_bits, size, crypt_method, l1_size,
     l1_offset, table_offset, table_clusters, snapshots, snapshots_offset,
    ) = _BASE.unpack_from(data)  # fmt: skip
    if version not in (2, 3):
        raise ImageError(name, f"qcow2 version {version} is not supported; 2 and 3 are")
    header = Header(
        version=version, cluster_bits=cluster_bits, size=size, l1_size=l1_size,
        l1_table_offset=l1_offset, refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters, nb_snapshots=snapshots,
        snapshots_offset=snapshots_offset, crypt_method=crypt_method,
        backing_file_offset=backing_offset,
    )  # fmt: skip
    if version == 3:
        _parse_v3(name, header, data)
    else:
        header.header_length, header.additional = V2_LENGTH, b""
    if backing_offset:
        header.backing_file = _backing_name(name, header, backing_size, data)
    return header


def _parse_v3(name: str, header: Header, data: bytes) -> None:
    if len(data) < V3_LENGTH_MIN:
        raise ImageError(name, "the file ends inside the qcow2 header")
    (header.incompatible_features, header.compatible_features, header.autoclear_features,
     header.refcount_order, length) = _V3.unpack_from(data, V2_LENGTH)  # fmt: skip
    if length < V3_LENGTH_MIN or length % 8 or length > min(len(data), header.cluster_size):
        raise ImageError(name, f"header_length {length} is not possible")
    header.header_length = length
    header.additional = data[V3_LENGTH_MIN:length]
    header.compression_type = header.additional[0] if header.additional else 0


def _backing_name(name: str, header: Header, length: int, data: bytes) -> str:
    offset = header.backing_file_offset
    end = min(header.cluster_size, len(data))
    if length > BACKING_NAME_MAX:
        raise ImageError(name, f"the backing file name is {length} bytes long; 1023 are allowed")
    if not length or offset < V2_LENGTH or offset + length > end:
        raise ImageError(name, "the backing file name is not in the image's first cluster")
    return data[offset : offset + length].decode("utf-8", "surrogateescape")


def _parse_extensions(name: str, area: bytes) -> list[Extension]:
    found: list[Extension] = []
    position = 0
    while position + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, position)
        if kind == EXTENSION_END:
            break
        start = position + _EXTENSION.size
        if start + length > len(area):
            raise ImageError(name, f"header extension {kind:#010x} reaches past the header")
        found.append(Extension(kind, area[start : start + length]))
        position = start + round_up(length, 8)
    return found


def _check_fields(name: str, header: Header) -> None:
    if header.refcount_order > REFCOUNT_ORDER_MAX:
        raise ImageError(name, f"refcount_order is {header.refcount_order}; at most 6 is possible")
    if header.layout.extended_l2 and header.cluster_bits < EXTENDED_L2_CLUSTER_BITS_MIN:
        raise ImageError(
            name,
            f"extended L2 entries with clusters of {header.cluster_size} bytes are not possible; "
            f"{1 << EXTENDED_L2_CLUSTER_BITS_MIN} is the least",
        )
    if header.size > SIZE_MAX:
        raise ImageError(name, f"a virtual size of {header.size} bytes is not possible")
    if header.l1_size * 8 > L1_BYTES_MAX:
        raise ImageError(name, f"the L1 table has {header.l1_size} entries; 32 MiB is the limit")
    if header.l1_size < header.layout.l1_entries(header.size):
        raise ImageError(
            name, f"the L1 table has {header.l1_size} entries, too few for {header.size} bytes"
        )
    if not header.refcount_table_clusters:
        raise ImageError(name, "the image has no refcount table")
    if header.refcount_table_clusters << header.cluster_bits > REFTABLE_BYTES_MAX:
        raise ImageError(
            name,
            f"the refcount table has {header.refcount_table_clusters} clusters; 8 MiB is the limit",
        )
    if header.nb_snapshots > SNAPSHOTS_MAX:
        raise ImageError(name, f"{header.nb_snapshots} snapshots; {SNAPSHOTS_MAX} is the limit")


def _check_features(name: str, header: Header) -> None:
    unsupported = header.incompatible_features & ~SUPPORTED
    if unsupported:
        table = header.extension(EXTENSION_FEATURE_NAMES) or b""
        names = ", ".join(feature_names(unsupported, table))
        raise ImageError(name, f"unsupported incompatible feature(s): {names}")
    if "\0" in (header.data_file or ""):
        raise ImageError(name, "the name of its external data file holds a zero byte")


def _check_encryption(name: str, header: Header) -> None:
    method = header.crypt_method
    if method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
        raise ImageError(name, f"the image is encrypted (method {method}), which is not supported")
    if method and header.has_data_file:
        raise ImageError(name, "encryption and an external data file together are not supported")
    data = header.extension(EXTENSION_ENCRYPTION)
    if method != CRYPT_LUKS:
        if data is not None:
            raise ImageError(name, "has an encryption header, but isn't encrypted by LUKS")
        return
    if data is None or len(data) != _CRYPTO_AREA.size:
        raise ImageError(name, "is encrypted by LUKS, but doesn't say where its LUKS header is")
    area = CryptoArea(*_CRYPTO_AREA.unpack(data))
    if not area.length or area.length > CRYPTO_BYTES_MAX:
        raise ImageError(name, f"a LUKS header of {area.length} bytes is not possible")


def check_tables(name: str, header: Header, *, file_bytes: int) -> None:
    """Refuse tables that the file can't hold or that lie over each other, before they are read.

    Raises: ImageError.
    """
    ranges = [("header", 0, header.cluster_size)]
    tables = [
        ("refcount table", header.refcount_table_offset,
         header.refcount_table_clusters << header.cluster_bits),
        ("L1 table", header.l1_table_offset, header.l1_size * 8),
        ("snapshot table", header.snapshots_offset, header.nb_snapshots * SNAPSHOT_ENTRY_MIN),
    ]  # fmt: skip
    crypto = header.crypto_area
    if crypto is not None:
        tables.append(("LUKS header", crypto.offset, crypto.length))
    for table, offset, length in tables:
        if not length:
            continue
        if offset % header.cluster_size:
            raise ImageError(name, f"the {table} at offset {offset} is not aligned to a cluster")
        if offset + length > file_bytes:
            raise ImageError(
                name,
                f"the {table} ({length} bytes at offset {offset}) reaches past the end of the file"
                f" ({file_bytes} bytes): the image is damaged or truncated",
            )
        for other, start, end in ranges:
            if offset < end and start < offset + length:
                raise ImageError(name, f"the {table} at offset {offset} lies over the {other}")
        ranges.append((table, offset, offset + length))


def check_writable(name: str, header: Header) -> None:
    """Refuse to write to an image that is known to be damaged. Raises: ImageError."""
    if header.incompatible_features & CORRUPT:
        raise ImageError(
            name,
            "the image is marked corrupt; open it read-only, or repair it with: "
            f"blockemu img check -r all {name}",
        )
