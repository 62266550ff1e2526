# SPDX-License-Identifier: Apache-2.0
"""Changing the key slots of a LUKS volume that is there: one more passphrase, or one less.

Order on the disk: a new slot's key material is durable before the header calls the slot active; an
erased slot is inactive in the header before its key material is overwritten. A crash leaves the
slots as they were or as they are to be, and at worst key material that nothing names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from blockemu.drivers.crypto import luks_header, luks_volume
from blockemu.drivers.crypto.create_options import take_iter_time
from blockemu.drivers.crypto.luks_header import HEADER_BYTES, SECTOR, SLOTS, LuksHeader
from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import refuse_unknown, take_choice, take_size, take_str

if TYPE_CHECKING:
    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.registry import Opener

KEYS: Final = ("state", "new-secret", "old-secret", "keyslot", "iter-time")
"""The options, under QEMU's names; behind `encrypt.` for qcow2 images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyAmendment:
    """What is to change. Secrets are ids."""

    active: bool
    new_secret: str | None = None
    old_secret: str | None = None
    slot: int | None = None
    iter_time_ms: int = luks_volume.ITER_TIME_MS
    force: bool = False
    """Also what loses a passphrase, or all of the image."""

    @classmethod
    def parse(cls, name: str, options: Mapping[str, Any], *, force: bool) -> KeyAmendment:
        """From the options without their prefix. Raises: ImageError."""
        rest = dict(options)
        if "state" not in rest:
            raise ImageError(
                name, "option 'state' must say what key slots become: active, inactive"
            )
        active = take_choice(name, rest, "state", ("active", "inactive"), "active") == "active"
        slot = take_size(name, rest, "keyslot", None)
        if slot is not None and slot >= SLOTS:
            raise ImageError(name, f"there is no key slot {slot}; 0 to {SLOTS - 1} are")
        new_secret = take_str(name, rest, "new-secret", None)
        old_secret = take_str(name, rest, "old-secret", None)
        if active and new_secret is None:
            raise ImageError(name, "option 'new-secret' must name the secret of the new key slot")
        if not active:
            if new_secret is not None or "iter-time" in rest:
                raise ImageError(name, "'new-secret' and 'iter-time' go with state=active only")
            if slot is None and old_secret is None:
                raise ImageError(
                    name, "say which key slot to erase: 'keyslot', or 'old-secret' that it has now"
                )
        iter_time_ms = take_iter_time(name, rest)
        refuse_unknown(name, rest, "luks")
        return cls(
            active=active, new_secret=new_secret, old_secret=old_secret, slot=slot,
            iter_time_ms=iter_time_ms, force=force,
        )  # fmt: skip


async def amend_keys(
    name: str,
    file: BdrvChild,
    *,
    start: int,
    length: int,
    amendment: KeyAmendment,
    key_secret: str | None,
    opener: Opener,
) -> None:
    """Carry it out on the LUKS header at `start` of `file`, `length` bytes with key material.

    `key_secret`: id of the secret that the image was opened with.
    Suspends: for I/O, and while a thread computes. Raises: ImageError; OSError.
    """
    data = bytearray(min(length, max(file.length_bytes - start, 0)))
    await file.preadv(start, memoryview(data))
    area = bytes(data)
    header = luks_header.parse(name, area)
    if amendment.active:
        old_secret = amendment.old_secret or key_secret
        if old_secret is None:
            raise ImageError(name, "option 'old-secret' must name a secret that the image has now")
        old = opener.secrets.find(name, old_secret)
        key = await opener.offload(luks_volume.unlock, name, header, area, old)
        slot = _slot_to_fill(name, header, amendment)
        assert amendment.new_secret is not None
        add = partial(
            luks_volume.add_key, slot=slot, entropy=opener.entropy,
            iter_time_ms=amendment.iter_time_ms,
        )  # fmt: skip
        new_secret = opener.secrets.find(name, amendment.new_secret)
        header, area = await opener.offload(add, name, header, area, key, new_secret)
        await _write_material(file, start, header, area, slot)
        await _write_header(file, start, area)
        return
    for slot in await _slots_to_erase(name, header, area, amendment, opener):
        header, area = luks_volume.erase_key(header, area, slot, entropy=opener.entropy)
        await _write_header(file, start, area)
        await _write_material(file, start, header, area, slot)


def _slot_to_fill(name: str, header: LuksHeader, amendment: KeyAmendment) -> int:
    slot = amendment.slot
    if slot is None:
        free = (index for index, found in enumerate(header.slots) if not found.active)
        slot = next(free, None)
        if slot is None:
            raise ImageError(name, "all LUKS key slots are active: erase one first")
    elif header.slots[slot].active and not amendment.force:
        raise ImageError(name, f"LUKS key slot {slot} is active: erase it first")
    return slot


async def _slots_to_erase(
    name: str, header: LuksHeader, area: bytes, amendment: KeyAmendment, opener: Opener
) -> list[int]:
    """Those that are meant, if it is right to erase them. Raises: ImageError."""
    wanted = [amendment.slot] if amendment.slot is not None else range(SLOTS)
    chosen = [slot for slot in wanted if header.slots[slot].active]
    if not chosen:
        raise ImageError(name, f"LUKS key slot {amendment.slot} is not active")
    if amendment.old_secret is not None:
        old = opener.secrets.find(name, amendment.old_secret)
        chosen = [
            slot for slot in chosen
            if await opener.offload(luks_volume.slot_matches, header, slot, area, old)
        ]  # fmt: skip
        if not chosen:
            raise ImageError(name, "no LUKS key slot has this old secret")
    if len(chosen) == sum(slot.active for slot in header.slots) and not amendment.force:
        raise ImageError(
            name, "nothing could unlock the image any more: its last active key slots are not "
            "erased without --force",
        )  # fmt: skip
    return chosen


async def _write_header(file: BdrvChild, start: int, area: bytes) -> None:
    await file.pwritev(start, memoryview(area)[:HEADER_BYTES])
    await file.flush()


async def _write_material(
    file: BdrvChild, start: int, header: LuksHeader, area: bytes, slot: int
) -> None:
    first = header.slots[slot].key_material_offset * SECTOR
    await file.pwritev(start + first, memoryview(area)[first : first + header.material_bytes])
    await file.flush()
