# SPDX-License-Identifier: Apache-2.0
"""Which cipher a volume uses: names as LUKS headers and QEMU's options spell them, and the
`SectorCipher` that they mean.

A header says `aes` and `xts-plain64`, and how long the key is; QEMU's options say `aes-256`, `xts`
and `plain64`. What `cryptography` doesn't have (Serpent, Twofish) is refused by its name.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.ciphers.algorithms import AES

from blockemu.drivers.crypto.sector_cipher import (
    CbcCipher,
    CtrCipher,
    EcbCipher,
    EcbContexts,
    IvGenerator,
    SectorCipher,
    XtsCipher,
    numbers,
)
from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm

HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
MODES: Final = ("ecb", "cbc", "xts", "ctr")
IV_GENERATORS: Final = ("plain", "plain64", "essiv")

_KEY_BYTES: Final = {
    "aes-128": 16,
    "aes-192": 24,
    "aes-256": 32,
    "cast5-128": 16,
}
"""Algorithms under QEMU's names, and the bytes of their keys."""

_UNSUPPORTED: Final = ("serpent", "twofish", "des", "3des")


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """A cipher under QEMU's names, which all exist. `iv_hash` goes with essiv only."""

    algorithm: str
    mode: str
    iv_generator: str
    iv_hash: str | None = None

    @property
    def key_bytes(self) -> int:
        """Of the master key: XTS takes two keys."""
        return _KEY_BYTES[self.algorithm] * (2 if self.mode == "xts" else 1)

    @property
    def header_name(self) -> str:
        """`cipher-name` in a LUKS header."""
        return self.algorithm.partition("-")[0]

    @property
    def header_mode(self) -> str:
        """`cipher-mode` in a LUKS header."""
        tail = f":{self.iv_hash}" if self.iv_hash is not None else ""
        return f"{self.mode}-{self.iv_generator}{tail}"

    @classmethod
    def from_options(
        cls, name: str, algorithm: str, mode: str, iv_generator: str, iv_hash: str | None
    ) -> CipherSpec:
        """Checked. Raises: ImageError, with the name of what isn't supported."""
        if algorithm not in _KEY_BYTES:
            known = ", ".join(_KEY_BYTES)
            raise ImageError(
                name, f"cipher algorithm '{algorithm}' is not supported; these are: {known}"
            )
        for what, value, choices in (
            ("cipher mode", mode, MODES),
            ("IV generator", iv_generator, IV_GENERATORS),
        ):
            if value not in choices:
                known = ", ".join(choices)
                raise ImageError(name, f"{what} '{value}' is not supported; these are: {known}")
        if mode in ("xts", "ctr") and not algorithm.startswith("aes"):
            raise ImageError(name, f"cipher '{algorithm}' has no mode '{mode}' here")
        if mode == "xts" and algorithm == "aes-192":
            raise ImageError(name, "mode 'xts' takes aes-128 or aes-256")
        if iv_generator == "essiv":
            if iv_hash is None:
                raise ImageError(name, "IV generator 'essiv' needs a hash (essiv:sha256)")
            _essiv_key_bytes(name, algorithm, iv_hash)
        else:
            iv_hash = None
        return cls(algorithm, mode, iv_generator, iv_hash)

    @classmethod
    def from_header(
        cls, name: str, cipher_name: str, cipher_mode: str, key_bytes: int
    ) -> CipherSpec:
        """From a LUKS header's fields. Raises: ImageError."""
        mode, _, ivs = cipher_mode.partition("-")
        iv_generator, _, iv_hash = ivs.partition(":")
        single = key_bytes // 2 if mode == "xts" else key_bytes
        if cipher_name in _UNSUPPORTED:
            raise ImageError(name, f"cipher algorithm '{cipher_name}' is not supported")
        if single * (2 if mode == "xts" else 1) != key_bytes:
            raise ImageError(name, f"a key of {key_bytes} bytes is not possible for mode '{mode}'")
        return cls.from_options(
            name, f"{cipher_name}-{single * 8}", mode, iv_generator, iv_hash or None
        )

    def cipher(self, key: bytes) -> SectorCipher:
        """The cipher with this key, of `key_bytes`."""
        assert len(key) == self.key_bytes
        if self.mode == "xts":
            return XtsCipher(key, self._ivs(key, 16))
        algorithm = self._block_cipher(key)
        if self.mode == "ecb":
            return EcbCipher(algorithm)
        ivs = self._ivs(key, algorithm.block_size // 8)
        if self.mode == "ctr":
            assert isinstance(algorithm, AES)
            return CtrCipher(algorithm, ivs)
        return CbcCipher(algorithm, ivs)

    def _block_cipher(self, key: bytes) -> BlockCipherAlgorithm:
        if self.header_name == "aes":
            return AES(key)
        from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5

        return CAST5(key)

    def _ivs(self, key: bytes, block: int) -> IvGenerator:
        if self.iv_generator == "plain":
            return lambda first, count: numbers(first, count, block=block, mask=2**32 - 1)
        if self.iv_generator == "plain64":
            return lambda first, count: numbers(first, count, block=block)
        assert self.iv_hash is not None
        # ESSIV: the number is encrypted under a hash of the key.
        contexts = EcbContexts(self._block_cipher(hashlib.new(self.iv_hash, key).digest()))

        def encrypted(first: int, count: int) -> bytearray:
            ivs = numbers(first, count, block=block)
            contexts.run(memoryview(ivs), decrypt=False)
            return ivs

        return encrypted


def check_hash(name: str, algorithm: str) -> None:
    """Raises: ImageError, if this hash isn't known or OpenSSL doesn't have it."""
    if algorithm in HASHES:
        try:
            hashlib.new(algorithm)
        except ValueError:
            pass
        else:
            return
    raise ImageError(name, f"hash algorithm '{algorithm}' is not supported here")


def _essiv_key_bytes(name: str, algorithm: str, iv_hash: str) -> int:
    """The hash's length must be that of a key of the same cipher."""
    check_hash(name, iv_hash)
    length = hashlib.new(iv_hash).digest_size
    lengths = (16, 24, 32) if algorithm.startswith("aes") else (16,)
    if length not in lengths:
        raise ImageError(name, f"IV generator 'essiv' can't use hash '{iv_hash}' with {algorithm}")
    return length
