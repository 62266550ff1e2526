# SPDX-License-Identifier: Apache-2.0
"""What a LUKS volume is asked: its master key for a passphrase; a new volume; a key slot more or
less.

Nothing here does I/O: functions take and return the bytes of the header area, everything before the
payload. PBKDF2 is slow by design, a second or more, so whoever calls these runs them in a thread
(`hashlib` does it without the GIL).

Context: any thread.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from blockemu.drivers.crypto import anti_forensic, luks_header
from blockemu.drivers.crypto.cipher_spec import CipherSpec
from blockemu.drivers.crypto.luks_header import (
    DIGEST_BYTES,
    HEADER_BYTES,
    ITERATIONS_MAX,
    SALT_BYTES,
    SECTOR,
    SLOTS,
    STRIPES,
    KeySlot,
    LuksHeader,
)
from blockemu.drivers.errors import ImageError
from blockemu.loop.clock import thread_cpu_ns
from blockemu.loop.entropy import Entropy

ITER_TIME_MS: Final = 2000
"""How long one PBKDF2 is to take, unless the user says otherwise."""

ITER_TIME_MS_MAX: Final = 60_000

NS_PER_MS: Final = 1_000_000

MEASURE_NS: Final = 50 * NS_PER_MS
"""A measurement that took this long counts."""

ITERATIONS_MIN: Final = 1000
"""Of any PBKDF2: the specification's."""

_DIGEST_SHARE: Final = 8
"""The master key's digest gets an eighth of a slot's iterations: a random key can't be guessed."""

_ALIGNMENT: Final = 8
"""Sectors: header and key material each begin on 4 KiB."""

Clock = Callable[[], int]
"""Nanoseconds that this thread has computed."""


@dataclass(frozen=True, slots=True)
class NewVolume:
    """What a new volume is to be."""

    spec: CipherSpec
    hash_name: str = "sha256"
    iter_time_ms: int = ITER_TIME_MS

    def payload_bytes(self) -> int:
        """Where the payload will begin."""
        return (_ALIGNMENT + SLOTS * _slot_sectors(self.spec.key_bytes)) * SECTOR


def _slot_sectors(key_bytes: int) -> int:
    sectors = -(-key_bytes * STRIPES // SECTOR)
    return -(-sectors // _ALIGNMENT) * _ALIGNMENT


# --- unlocking ---


def unlock(name: str, header: LuksHeader, area: bytes, passphrase: bytes) -> bytes:
    """The master key. `area`: everything before the payload, as long as the file has it.

    Takes as long as PBKDF2 does for each active slot until one fits.
    Raises: ImageError, if none does.
    """
    found = find_slot(header, area, passphrase)
    if found is None:
        if not any(slot.active for slot in header.slots):
            raise ImageError(name, "no LUKS key slot is active: nothing can unlock the image")
        raise ImageError(name, "the secret is wrong: it unlocks no LUKS key slot")
    return found[1]


def find_slot(header: LuksHeader, area: bytes, passphrase: bytes) -> tuple[int, bytes] | None:
    """`(slot, master key)` of the first slot that this passphrase unlocks, or None."""
    for index, slot in enumerate(header.slots):
        if slot.active:
            key = _key_in_slot(header, slot, area, passphrase)
            if _is_master_key(header, key):
                return index, key
    return None


def slot_matches(header: LuksHeader, slot: int, area: bytes, passphrase: bytes) -> bool:
    """Whether this passphrase unlocks this active slot."""
    return _is_master_key(header, _key_in_slot(header, header.slots[slot], area, passphrase))


def _key_in_slot(header: LuksHeader, slot: KeySlot, area: bytes, passphrase: bytes) -> bytes:
    start = slot.key_material_offset * SECTOR
    material = bytearray(area[start : start + header.material_bytes])
    material.extend(bytes(header.material_bytes - len(material)))
    split = memoryview(material)[: header.key_bytes * STRIPES]
    header.spec.cipher(_slot_key(header, slot, passphrase)).decrypt(0, split)
    return anti_forensic.merge(
        bytes(split), key_bytes=header.key_bytes, stripes=STRIPES, hash_name=header.hash_name
    )


def _slot_key(header: LuksHeader, slot: KeySlot, passphrase: bytes) -> bytes:
    return hashlib.pbkdf2_hmac(
        header.hash_name, passphrase, slot.salt, slot.iterations, header.key_bytes
    )


def _is_master_key(header: LuksHeader, key: bytes) -> bool:
    return hmac.compare_digest(
        _digest(header.hash_name, key, header.digest_salt, header.digest_iterations),
        header.digest,
    )


def _digest(hash_name: str, key: bytes, salt: bytes, iterations: int) -> bytes:
    return hashlib.pbkdf2_hmac(hash_name, key, salt, iterations, DIGEST_BYTES)


# --- creating ---


def create(
    name: str,
    new: NewVolume,
    passphrase: bytes,
    *,
    entropy: Entropy,
    clock: Clock = thread_cpu_ns,
) -> tuple[LuksHeader, bytes, bytes]:
    """`(header, header area, master key)` of a new volume with one key slot.

    Takes a while: it measures how quick PBKDF2 is here. Raises: ImageError.
    """
    spec = new.spec
    key = entropy(spec.key_bytes)
    salt = entropy(SALT_BYTES)
    iterations = choose_iterations(
        new.hash_name, DIGEST_BYTES, new.iter_time_ms, share=_DIGEST_SHARE, clock=clock
    )
    per_slot = _slot_sectors(spec.key_bytes)
    header = LuksHeader(
        spec=spec,
        hash_name=new.hash_name,
        payload_offset=_ALIGNMENT + SLOTS * per_slot,
        digest=_digest(new.hash_name, key, salt, iterations),
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=_new_uuid(entropy),
        slots=tuple(
            KeySlot(False, 0, bytes(SALT_BYTES), _ALIGNMENT + index * per_slot, STRIPES)
            for index in range(SLOTS)
        ),
    )
    area = header.serialise().ljust(header.payload_bytes, b"\0")
    header, area = add_key(
        name,
        header,
        area,
        key,
        passphrase,
        slot=0,
        entropy=entropy,
        iter_time_ms=new.iter_time_ms,
        clock=clock,
    )
    return header, area, key


def _new_uuid(entropy: Entropy) -> str:
    """A random one (RFC 9562, version 4)."""
    number = int.from_bytes(entropy(16), "big")
    number = number & ~(0xF << 76) & ~(0x3 << 62) | 4 << 76 | 2 << 62
    digits = f"{number:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def choose_iterations(
    hash_name: str, key_bytes: int, time_ms: int, *, share: int = 1, clock: Clock = thread_cpu_ns
) -> int:
    """How many iterations take about `time_ms / share` on this machine, within the bounds."""
    iterations = 1 << 12
    while True:
        start = clock()
        hashlib.pbkdf2_hmac(hash_name, b"password", b"salt" * 8, iterations, key_bytes)
        took_ns = max(clock() - start, 1)
        if took_ns >= min(MEASURE_NS, time_ms * NS_PER_MS) or iterations >= ITERATIONS_MAX:
            break
        iterations *= 4
    wanted = iterations * time_ms * NS_PER_MS // (took_ns * share)
    return min(max(wanted, ITERATIONS_MIN), ITERATIONS_MAX)


# --- key slots ---


def add_key(
    name: str,
    header: LuksHeader,
    area: bytes,
    key: bytes,
    passphrase: bytes,
    *,
    slot: int,
    entropy: Entropy,
    iter_time_ms: int = ITER_TIME_MS,
    clock: Clock = thread_cpu_ns,
) -> tuple[LuksHeader, bytes]:
    """The header and its area with the master key under `passphrase` in key slot `slot`.

    Raises: ImageError, when all slots together would ask for more iterations than are read again.
    """
    iterations = choose_iterations(header.hash_name, header.key_bytes, iter_time_ms, clock=clock)
    others = sum(
        other.iterations
        for index, other in enumerate(header.slots)
        if other.active and index != slot
    )
    if others + iterations > luks_header.ITERATIONS_TOTAL_MAX:
        raise ImageError(
            name,
            f"all LUKS key slots together would ask for {others + iterations} iterations; "
            f"{luks_header.ITERATIONS_TOTAL_MAX} are supported (take a lower iter-time)",
        )
    made = header.slots[slot]._replace(active=True, iterations=iterations, salt=entropy(SALT_BYTES))
    split = anti_forensic.split(key, stripes=STRIPES, hash_name=header.hash_name, random=entropy)
    coded = bytearray(len(split))
    cipher = header.spec.cipher(_slot_key(header, made, passphrase))
    cipher.encrypt(0, memoryview(split), memoryview(coded))
    new = _with_slot(header, slot, made)
    return new, _patched(new, area, slot, bytes(coded))


def erase_key(
    header: LuksHeader, area: bytes, slot: int, *, entropy: Entropy
) -> tuple[LuksHeader, bytes]:
    """The header and its area without key slot `slot`, whose key material is random bytes then."""
    emptied = header.slots[slot]._replace(active=False, iterations=0, salt=bytes(SALT_BYTES))
    new = _with_slot(header, slot, emptied)
    return new, _patched(new, area, slot, entropy(header.key_bytes * STRIPES))


def _with_slot(header: LuksHeader, index: int, slot: KeySlot) -> LuksHeader:
    slots = list(header.slots)
    slots[index] = slot
    return replace(header, slots=tuple(slots))


def _patched(header: LuksHeader, area: bytes, slot: int, material: bytes) -> bytes:
    start = header.slots[slot].key_material_offset * SECTOR
    return b"".join(
        (header.serialise(), area[HEADER_BYTES:start], material, area[start + len(material) :])
    )


def describe(header: LuksHeader) -> dict[str, object]:
    """QCryptoBlockInfoLUKS, under QEMU's names and in the order in which qemu-img prints them."""
    spec = header.spec
    facts: dict[str, object] = {"ivgen-alg": spec.iv_generator, "hash-alg": header.hash_name}
    facts["cipher-alg"] = spec.algorithm
    facts["uuid"] = header.uuid
    if spec.iv_hash is not None:
        facts["ivgen-hash-alg"] = spec.iv_hash
    facts["cipher-mode"] = spec.mode
    facts["slots"] = [_describe_slot(slot) for slot in header.slots]
    facts["payload-offset"] = header.payload_bytes
    facts["master-key-iters"] = header.digest_iterations
    return facts


def _describe_slot(slot: KeySlot) -> dict[str, object]:
    facts: dict[str, object] = {"active": slot.active}
    if slot.active:
        facts["iters"] = slot.iterations
    facts["key-offset"] = slot.key_material_offset * SECTOR
    if slot.active:
        facts["stripes"] = slot.stripes
    return facts
