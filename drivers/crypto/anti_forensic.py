# SPDX-License-Identifier: Apache-2.0
"""The anti-forensic splitter (LUKS on-disk format specification 1.2.3, chapter 2).

A key is inflated to many stripes, so that all of them are needed to have it back: to destroy a key
on a disk that may have moved a sector or two elsewhere, it is enough to overwrite any of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable


def merge(split: bytes, *, key_bytes: int, stripes: int, hash_name: str) -> bytes:
    """The key that was split."""
    assert len(split) == key_bytes * stripes
    state = bytes(key_bytes)
    for start in range(0, key_bytes * (stripes - 1), key_bytes):
        state = _diffuse(_xor(state, split[start : start + key_bytes]), hash_name)
    return _xor(state, split[-key_bytes:])


def split(key: bytes, *, stripes: int, hash_name: str, random: Callable[[int], bytes]) -> bytes:
    """`len(key) * stripes` bytes; `random(n)` gives n of them."""
    filler = random(len(key) * (stripes - 1))
    state = bytes(len(key))
    for start in range(0, len(filler), len(key)):
        state = _diffuse(_xor(state, filler[start : start + len(key)]), hash_name)
    return filler + _xor(state, key)


def _xor(one: bytes, other: bytes) -> bytes:
    mixed = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    return mixed.to_bytes(len(one), "little")


def _diffuse(data: bytes, hash_name: str) -> bytes:
    """H2 of the specification: each digest-sized piece is hashed behind its number."""
    size = hashlib.new(hash_name).digest_size
    pieces = []
    for number, start in enumerate(range(0, len(data), size)):
        piece = data[start : start + size]
        digest = hashlib.new(hash_name, number.to_bytes(4, "big") + piece).digest()
        pieces.append(digest[: len(piece)])
    return b"".join(pieces)
