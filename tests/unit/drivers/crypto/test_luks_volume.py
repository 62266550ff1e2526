# SPDX-License-Identifier: Apache-2.0
"""LUKS headers: made, read again, unlocked, changed, and refused where they lie."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockemu.drivers.crypto import anti_forensic, luks_volume
from blockemu.drivers.crypto.luks_header import (
    HEADER_BYTES,
    ITERATIONS_MAX,
    MAGIC,
    SLOTS,
    parse,
)
from blockemu.drivers.errors import ImageError
from tests.unit.drivers.crypto.luks_samples import NAME, SECRET, sample, slow_clock

SLOT_0 = 208
_GOOD = sample()[1][:HEADER_BYTES]


def test_a_new_volume_is_read_and_unlocked_again() -> None:
    header, area, key = sample()

    again = parse(NAME, area)

    assert again == header
    assert len(area) == header.payload_bytes == 2068480
    assert luks_volume.unlock(NAME, again, area, SECRET) == key


def test_a_wrong_passphrase_unlocks_nothing() -> None:
    header, area, _ = sample()

    with pytest.raises(ImageError, match="the secret is wrong") as caught:
        luks_volume.unlock(NAME, header, area, b"incorrect horse")

    assert "horse" not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "mode"), [("aes-128", "xts"), ("aes-192", "cbc"), ("cast5-128", "cbc")]
)
def test_ciphers_of_all_key_lengths(algorithm: str, mode: str) -> None:
    header, area, key = sample(algorithm, mode)
    assert luks_volume.unlock(NAME, parse(NAME, area), area, SECRET) == key
    assert len(key) == header.key_bytes


def test_slots_come_and_go() -> None:
    header, area, key = sample()
    entropy = random.Random(2).randbytes
    header, area = luks_volume.add_key(
        NAME, header, area, key, b"second", slot=5, entropy=entropy, iter_time_ms=1,
        clock=slow_clock(),
    )  # fmt: skip
    assert luks_volume.find_slot(header, area, b"second") == (5, key)
    assert luks_volume.find_slot(header, area, SECRET) == (0, key)

    header, area = luks_volume.erase_key(header, area, 0, entropy=entropy)

    again = parse(NAME, area)
    assert again == header
    assert luks_volume.find_slot(again, area, SECRET) is None
    assert luks_volume.find_slot(again, area, b"second") == (5, key)


def test_a_header_says_nothing_of_its_salts_and_digest() -> None:
    header, _, key = sample()
    shown = repr(header)
    assert repr(header.digest) not in shown
    assert repr(key) not in shown


def test_splitting_and_merging_are_inverse() -> None:
    key = bytes(range(40))
    split = anti_forensic.split(key, stripes=7, hash_name="sha1", random=random.Random(3).randbytes)
    assert len(split) == 280
    merged = anti_forensic.merge(split, key_bytes=40, stripes=7, hash_name="sha1")
    assert merged == key
    damaged = bytes([split[0] ^ 1]) + split[1:]
    assert anti_forensic.merge(damaged, key_bytes=40, stripes=7, hash_name="sha1") != key


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"SKUL", "no LUKS header"),
        (6, b"\0\2", "LUKS version 2"),
        (8, b"serpent\0", "'serpent' is not supported"),
        (8, b"a\nb\0", "cipher-name is not a text"),
        (8, b"a" * 32, "cipher-name is not a text"),
        (40, b"xts-benbi\0", "'benbi' is not supported"),
        (72, b"tiger\0", "'tiger' is not supported"),
        (104, struct.pack(">I", 0), "payload at byte 0"),
        (104, struct.pack(">I", 2**32 - 1), "payload at byte 2199"),
        (104, struct.pack(">I", 4000), "slot 7 at byte 1810432 reaches into the payload"),
        (108, struct.pack(">I", 2**32 - 1), "bytes is not possible"),
        (108, struct.pack(">I", 62), "'aes-248' is not supported"),
        (164, struct.pack(">I", 2**32 - 1), f"1 to {ITERATIONS_MAX}"),
        (164, bytes(4), "asks for 0 iterations"),
        (SLOT_0, b"\1", "slot 0 is neither active nor inactive"),
        (SLOT_0 + 4, struct.pack(">I", 2**32 - 1), f"1 to {ITERATIONS_MAX}"),
        (SLOT_0 + 40, struct.pack(">I", 0), "slot 0 at byte 0 lies over the header"),
        (SLOT_0 + 40, struct.pack(">I", 600), "lies over LUKS key slot 0"),
        (SLOT_0 + 44, struct.pack(">I", 2**32 - 1), "slot 0 has 4294967295 stripes"),
    ],
)
def test_a_hostile_header_is_refused_before_it_costs_anything(
    offset: int, value: bytes, reason: str
) -> None:
    _, area, _ = sample()
    changed = bytearray(area[:HEADER_BYTES])
    changed[offset : offset + len(value)] = value

    with pytest.raises(ImageError, match=f"{NAME}: .*{reason}"):
        parse(NAME, bytes(changed))


def test_slots_that_ask_for_too_many_iterations_together_are_refused() -> None:
    _, area, _ = sample()
    changed = bytearray(area[:HEADER_BYTES])
    for slot in range(SLOTS):
        struct.pack_into(">II", changed, SLOT_0 + slot * 48, 0x00AC71F3, ITERATIONS_MAX)

    with pytest.raises(ImageError, match="iterations in all"):
        parse(NAME, bytes(changed))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_stands_in_a_header_is_parsed_or_refused(data: st.DataObject) -> None:
    changed = bytearray(_GOOD if data.draw(st.booleans()) else MAGIC)
    for _ in range(data.draw(st.integers(0, 4))):
        offset = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        value = data.draw(st.binary(min_size=1, max_size=8))
        changed[offset : offset + len(value)] = value
    try:
        header = parse(NAME, bytes(changed))
    except ImageError as error:
        reason: str | None = str(error)
    else:
        reason = None
        assert header.payload_bytes <= 64 << 20
    assert reason is None or "\n" not in reason
