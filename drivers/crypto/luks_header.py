# SPDX-License-Identifier: Apache-2.0
"""The header of a LUKS volume, version 1: parsed, judged, written.

Layout (LUKS on-disk format specification 1.2.3, figures 1 and 2; big endian):

    0   magic "LUKS\\xba\\xbe"     104 payload-offset (sectors)   168 uuid (40)
    6   version                  108 key-bytes                  208 key slots, 8 of 48 bytes:
    8   cipher-name (32)         112 mk-digest (20)                 0  active
    40  cipher-mode (32)         132 mk-digest-salt (32)            4  iterations
    72  hash-spec (32)           164 mk-digest-iterations           8  salt (32)
                                                                    40 key-material-offset (sectors)
                                                                    44 stripes

Everything that costs time or memory is bounded here, before it is spent: iterations of PBKDF2, the
bytes of key material, and where that may lie.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from blockemu.drivers.crypto.cipher_spec import CipherSpec, check_hash
from blockemu.drivers.errors import ImageError

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_BYTES: Final = 592
SECTOR: Final = 512
SLOTS: Final = 8
STRIPES: Final = 4000
SALT_BYTES: Final = 32
DIGEST_BYTES: Final = 20

ITERATIONS_MAX: Final = 50_000_000
"""Of one PBKDF2: half a minute to two. qemu-img and cryptsetup choose as many as take 2 seconds on
the machine at hand, unless told otherwise."""

ITERATIONS_TOTAL_MAX: Final = 100_000_000
"""Of all key slots that a passphrase has to be tried on."""

PAYLOAD_OFFSET_MAX: Final = 64 * 1024 * 1024
"""Bytes: eight slots of the longest key take 2 MiB, and cryptsetup aligns to a few at most."""

_ACTIVE: Final = 0x00AC71F3
_INACTIVE: Final = 0x0000DEAD

_FIXED = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")


class KeySlot(NamedTuple):
    """Where a copy of the master key lies, and what unlocks it. Offsets in sectors."""

    active: bool
    iterations: int
    salt: bytes
    key_material_offset: int
    stripes: int


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A header's fields. `key_bytes` are those of the master key."""

    spec: CipherSpec
    hash_name: str
    payload_offset: int
    """Sectors."""
    digest: bytes = field(repr=False)
    digest_salt: bytes = field(repr=False)
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...] = field(repr=False)

    @property
    def key_bytes(self) -> int:
        return self.spec.key_bytes

    @property
    def material_bytes(self) -> int:
        """Of one slot's split key, in whole sectors."""
        return -(-self.key_bytes * STRIPES // SECTOR) * SECTOR

    @property
    def payload_bytes(self) -> int:
        """Where the payload begins: the length of header and key material together."""
        return self.payload_offset * SECTOR

    def serialise(self) -> bytes:
        """HEADER_BYTES of it."""
        spec = self.spec
        fixed = _FIXED.pack(
            MAGIC, 1, spec.header_name.encode(), spec.header_mode.encode(),
            self.hash_name.encode(), self.payload_offset, self.key_bytes, self.digest,
            self.digest_salt, self.digest_iterations, self.uuid.encode(),
        )  # fmt: skip
        return fixed + b"".join(
            _SLOT.pack(
                _ACTIVE if slot.active else _INACTIVE, slot.iterations, slot.salt,
                slot.key_material_offset, slot.stripes,
            )
            for slot in self.slots
        )  # fmt: skip


def recognises(start: bytes) -> bool:
    """Whether these are a LUKS volume's first bytes."""
    return start[:6] == MAGIC and start[6:8] == b"\0\1"


def parse(name: str, data: bytes) -> LuksHeader:
    """Parse and judge a header. Raises: ImageError, naming what is wrong."""
    if len(data) < HEADER_BYTES or data[:6] != MAGIC:
        raise ImageError(name, "there is no LUKS header where one should be")
    (_, version, cipher_name, cipher_mode, hash_name, payload_offset, key_bytes, digest, salt,
     iterations, uuid) = _FIXED.unpack_from(data)  # fmt: skip
    if version != 1:
        raise ImageError(name, f"LUKS version {version} is not supported; 1 is")
    hash_text = _text(name, "hash-spec", hash_name)
    check_hash(name, hash_text)
    spec = CipherSpec.from_header(
        name, _text(name, "cipher-name", cipher_name), _text(name, "cipher-mode", cipher_mode),
        key_bytes,
    )  # fmt: skip
    slots = []
    for index in range(SLOTS):
        active, *rest = _SLOT.unpack_from(data, _FIXED.size + index * _SLOT.size)
        if active not in (_ACTIVE, _INACTIVE):
            raise ImageError(name, f"LUKS key slot {index} is neither active nor inactive")
        slots.append(KeySlot(active == _ACTIVE, *rest))
    header = LuksHeader(
        spec, hash_text, payload_offset, digest, salt, iterations,
        _text(name, "uuid", uuid), tuple(slots),
    )  # fmt: skip
    _check_places(name, header)
    _check_iterations(name, header)
    return header


def _text(name: str, what: str, data: bytes) -> str:
    text, end, _ = data.partition(b"\0")
    if not end or not text.isascii() or not text.decode("ascii").isprintable():
        raise ImageError(name, f"the LUKS header's {what} is not a text")
    return text.decode("ascii")


def _check_places(name: str, header: LuksHeader) -> None:
    if not HEADER_BYTES <= header.payload_bytes <= PAYLOAD_OFFSET_MAX:
        raise ImageError(name, f"a LUKS payload at byte {header.payload_bytes} is not possible")
    taken = [("the header", 0, HEADER_BYTES)]
    for index, slot in enumerate(header.slots):
        what = f"LUKS key slot {index}"
        if slot.stripes != STRIPES:
            raise ImageError(name, f"{what} has {slot.stripes} stripes; {STRIPES} are supported")
        start = slot.key_material_offset * SECTOR
        end = start + header.material_bytes
        if end > header.payload_bytes:
            raise ImageError(name, f"{what} at byte {start} reaches into the payload")
        for other, low, high in taken:
            if start < high and low < end:
                raise ImageError(name, f"{what} at byte {start} lies over {other}")
        taken.append((what, start, end))


def _check_iterations(name: str, header: LuksHeader) -> None:
    active = [slot.iterations for slot in header.slots if slot.active]
    for iterations in (header.digest_iterations, *active):
        if not 1 <= iterations <= ITERATIONS_MAX:
            raise ImageError(
                name, f"the LUKS header asks for {iterations} iterations; 1 to {ITERATIONS_MAX} "
                "are supported",
            )  # fmt: skip
    if sum(active) > ITERATIONS_TOTAL_MAX:
        raise ImageError(
            name, f"the LUKS key slots ask for {sum(active)} iterations in all; "
            f"{ITERATIONS_TOTAL_MAX} are supported",
        )  # fmt: skip
