# SPDX-License-Identifier: Apache-2.0
"""What a new qcow2 image is to be: qemu-img's creation options, checked together.

Contradictions are found here, before a byte of the target is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from blockemu.drivers.crypto.create_options import take_new_volume
from blockemu.drivers.crypto.luks_volume import NewVolume
from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_bool, take_choice, take_size, take_str
from blockemu.drivers.qcow2.compression import DEFLATE, ZSTD
from blockemu.drivers.qcow2.header import SIZE_MAX
from blockemu.drivers.qcow2.layout import (
    BACKING_NAME_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    EXTENDED_L2_CLUSTER_BITS_MIN,
    L1_BYTES_MAX,
    REFCOUNT_ORDER_MAX,
    SECTOR,
    Layout,
    round_up,
)

PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")
_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_COMPRESSION_TYPES = {"zlib": DEFLATE, "zstd": ZSTD}


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """Validated: `layout` and the rest fit each other. `size_bytes` is whole sectors."""

    layout: Layout
    size_bytes: int
    backing_file: str | None = None
    backing_fmt: str | None = None
    preallocation: str = "off"
    lazy_refcounts: bool = False
    compression_type: int = DEFLATE
    encryption: NewVolume | None = None
    key_secret: str | None = None
    """Id of the secret that the encrypted image gets."""
    data_file: str | None = None
    data_file_raw: bool = False

    @property
    def maps_all(self) -> bool:
        """All guest clusters have their place from the start."""
        return self.preallocation != "off" or self.data_file_raw

    @classmethod
    def parse(cls, name: str, size_bytes: int, options: Mapping[str, Any]) -> CreateOptions:
        """From qemu-img's names: `cluster_size`, `compat`, `refcount_bits`, `backing_file`,
        `backing_fmt`, `preallocation`, `lazy_refcounts`, `compression_type`, `extended_l2`,
        `data_file`, `data_file_raw`, `encrypt.format` and what goes with it.

        Raises: ImageError, for what is unknown, out of range or contradictory.
        """
        rest = dict(options)
        compat = take_choice(name, rest, "compat", tuple(_VERSIONS), "1.1")
        version = _VERSIONS[compat]
        layout = Layout(
            _cluster_bits(name, take_size(name, rest, "cluster_size", 65536)),
            _refcount_order(name, take_size(name, rest, "refcount_bits", 16), version),
            version,
            take_bool(name, rest, "extended_l2", default=False),
        )
        compression = take_choice(name, rest, "compression_type", tuple(_COMPRESSION_TYPES), "zlib")
        encryption = _take_encryption(name, rest)
        found = cls(
            layout=layout,
            encryption=encryption,
            key_secret=take_str(name, rest, "encrypt.key-secret", None) if encryption else None,
            size_bytes=round_up(size_bytes, SECTOR),
            backing_file=take_str(name, rest, "backing_file", None),
            backing_fmt=take_str(name, rest, "backing_fmt", None),
            preallocation=take_choice(name, rest, "preallocation", PREALLOCATIONS, "off"),
            lazy_refcounts=take_bool(name, rest, "lazy_refcounts", default=False),
            compression_type=_COMPRESSION_TYPES[compression],
            data_file=take_str(name, rest, "data_file", None),
            data_file_raw=take_bool(name, rest, "data_file_raw", default=False),
        )
        if rest:
            raise ImageError(name, f"format qcow2 has no option '{next(iter(rest))}'")
        found._check(name)
        return found

    def _check(self, name: str) -> None:
        if self.layout.version == 2:
            if self.lazy_refcounts:
                raise ImageError(name, "lazy_refcounts=on needs compat=1.1 or above")
            if self.compression_type != DEFLATE:
                raise ImageError(name, "compression_type=zstd needs compat=1.1 or above")
            if self.encryption is not None and self.preallocation != "off":
                raise ImageError(
                    name, "an encrypted image can be preallocated with compat=1.1 or above only"
                )
            if self.layout.extended_l2:
                raise ImageError(name, "extended_l2=on needs compat=1.1 or above")
            if self.data_file is not None:
                raise ImageError(name, "data_file needs compat=1.1 or above")
        if self.layout.extended_l2 and self.layout.cluster_bits < EXTENDED_L2_CLUSTER_BITS_MIN:
            raise ImageError(
                name,
                f"extended_l2=on needs a cluster_size of {1 << EXTENDED_L2_CLUSTER_BITS_MIN} at "
                f"least, not {self.layout.cluster_size}",
            )
        if not 0 <= self.size_bytes <= SIZE_MAX:
            raise ImageError(name, f"a size of {self.size_bytes} bytes is not possible")
        if self.layout.l1_entries(self.size_bytes) * 8 > L1_BYTES_MAX:
            raise ImageError(
                name,
                f"{self.size_bytes} bytes are too many for clusters of "
                f"{self.layout.cluster_size}; take a larger cluster_size",
            )
        self._check_backing(name)
        self._check_data_file(name)

    def _check_backing(self, name: str) -> None:
        if self.backing_file is None:
            if self.backing_fmt is not None:
                raise ImageError(name, "backing_fmt is given without a backing_file")
            return
        if not self.backing_file:
            raise ImageError(name, "the backing file's name is empty")
        if not self.backing_fmt:
            raise ImageError(name, "a backing_file needs its format, too: backing_fmt")
        if len(self.backing_file.encode("utf-8", "surrogateescape")) > BACKING_NAME_MAX:
            raise ImageError(name, f"the backing file's name is over {BACKING_NAME_MAX} bytes")
        if self.preallocation != "off" and not self.layout.extended_l2:
            raise ImageError(name, "an image with a backing_file can't be preallocated")

    def _check_data_file(self, name: str) -> None:
        if self.data_file is not None and self.encryption is not None:
            raise ImageError(name, "encryption and data_file aren't supported together")
        if self.data_file is None:
            if self.data_file_raw:
                raise ImageError(name, "data_file_raw=on is given without a data_file")
        elif not self.data_file or "\0" in self.data_file:
            raise ImageError(name, "the data file's name is empty or holds a zero byte")
        elif self.data_file_raw and self.backing_file is not None:
            raise ImageError(
                name, "a backing_file can't be had with data_file_raw=on: the data file alone "
                "wouldn't show what the disk holds"
            )  # fmt: skip


def _take_encryption(name: str, options: dict[str, Any]) -> NewVolume | None:
    """Raises: ImageError: not LUKS, or without encryption."""
    legacy = take_bool(name, options, "encryption", default=False)
    fmt = take_choice(name, options, "encrypt.format", ("none", "aes", "luks"), "none")
    if legacy or fmt == "aes":
        raise ImageError(
            name, "AES encryption is legacy, and not for new images; take encrypt.format=luks"
        )
    if fmt == "luks":
        return take_new_volume(name, options, prefix="encrypt.")
    given = next((key for key in options if key.startswith("encrypt.")), None)
    if given is not None:
        raise ImageError(name, f"option '{given}' goes with encrypt.format=luks")
    return None


def _cluster_bits(name: str, size: int) -> int:
    bits = size.bit_length() - 1
    if size != 1 << max(bits, 0) or not CLUSTER_BITS_MIN <= bits <= CLUSTER_BITS_MAX:
        raise ImageError(
            name, f"cluster_size must be a power of two between 512 and 2M, not {size}"
        )
    return bits


def _refcount_order(name: str, bits: int, version: int) -> int:
    order = bits.bit_length() - 1
    if bits != 1 << max(order, 0) or order > REFCOUNT_ORDER_MAX:
        raise ImageError(name, f"refcount_bits must be a power of two up to 64, not {bits}")
    if version == 2 and bits != 16:
        raise ImageError(name, f"refcount_bits={bits} needs compat=1.1 or above")
    return order
