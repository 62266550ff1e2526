# SPDX-License-Identifier: Apache-2.0
"""Sectors by the quick ways, beside OpenSSL's own modes, one call for each sector."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from blockemu.drivers.crypto.cipher_spec import CipherSpec
from blockemu.drivers.errors import ImageError

SECTOR = 512
NUMBERS = (0, 7, 2**32 - 2, 2**40)


def plainly(mode: str, key: bytes, number: int, data: bytes) -> bytes:
    """One sector, by OpenSSL."""
    iv = number.to_bytes(16, "little")
    chosen = {"xts": modes.XTS, "cbc": modes.CBC, "ctr": modes.CTR}[mode](iv)
    return Cipher(AES(key), chosen).encryptor().update(data)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("sectors", [1, 2, 9])
@pytest.mark.parametrize(
    ("algorithm", "mode"),
    [("aes-256", "xts"), ("aes-128", "xts"), ("aes-256", "cbc"), ("aes-192", "cbc"),
     ("aes-256", "ctr")],
)  # fmt: skip
def test_sectors_are_what_openssl_makes_of_each(
    algorithm: str, mode: str, sectors: int, number: int
) -> None:
    spec = CipherSpec.from_options("x", algorithm, mode, "plain64", None)
    key = os.urandom(spec.key_bytes)
    data = os.urandom(sectors * SECTOR)
    wanted = b"".join(
        plainly(mode, key, number + index, data[index * SECTOR :][:SECTOR])
        for index in range(sectors)
    )
    cipher = spec.cipher(key)
    coded = bytearray(len(data))

    cipher.encrypt(number, memoryview(data), memoryview(coded))
    assert coded == wanted
    cipher.decrypt(number, memoryview(coded))
    assert coded == data


@pytest.mark.parametrize("length", [256, 512 + 256, 16])
@pytest.mark.parametrize("algorithm", ["aes-128", "cast5-128"])
def test_a_last_sector_may_be_short(algorithm: str, length: int) -> None:
    spec = CipherSpec.from_options("x", algorithm, "cbc", "plain64", None)
    cipher = spec.cipher(os.urandom(16))
    data = os.urandom(length)
    coded = bytearray(length)

    cipher.encrypt(3, memoryview(data), memoryview(coded))
    assert coded != data
    cipher.decrypt(3, memoryview(coded))
    assert coded == data


def test_plain_counts_in_32_bits() -> None:
    key = bytes(range(32))
    data = os.urandom(2 * SECTOR)
    coded = []
    for generator, number in (("plain", 2**32 - 1), ("plain64", 2**32 - 1), ("plain64", -1)):
        cipher = CipherSpec.from_options("x", "aes-256", "cbc", generator, None).cipher(key)
        target = bytearray(len(data))
        cipher.encrypt(number % 2**64, memoryview(data), memoryview(target))
        coded.append(bytes(target))
    assert coded[0][:SECTOR] == coded[1][:SECTOR]
    assert coded[0][SECTOR:] != coded[1][SECTOR:]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("serpent-256", "xts", "plain64", None), "serpent-256"),
        (("aes-256", "lrw", "plain64", None), "lrw"),
        (("aes-256", "xts", "benbi", None), "benbi"),
        (("aes-192", "xts", "plain64", None), "xts"),
        (("aes-256", "cbc", "essiv", None), "essiv"),
        (("aes-256", "cbc", "essiv", "sha1"), "sha1"),
        (("cast5-128", "xts", "plain64", None), "cast5-128"),
    ],
)
def test_what_is_not_supported_is_named(
    options: tuple[str, str, str, str | None], named: str
) -> None:
    with pytest.raises(ImageError, match=named) as caught:
        CipherSpec.from_options("disk.img", *options)
    assert caught.value.name == "disk.img"


def test_a_cipher_says_nothing_of_its_key() -> None:
    key = b"0123456789abcdef" * 4
    cipher = CipherSpec.from_options("x", "aes-256", "xts", "plain64", None).cipher(key)
    assert "0123" not in repr(cipher)
    assert "0123" not in repr(vars(cipher))
