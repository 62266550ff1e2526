# SPDX-License-Identifier: Apache-2.0
"""Ciphers over sectors of 512 bytes, each with an IV made from its number.

One call of OpenSSL for each sector costs 5 us, most of it in making the context: 90 MB/s. So:

- XTS (IEEE 1619) encrypts the tweaks of all sectors in one ECB call, and all their blocks in
  another; around them the masks are XORed by C (native/xts_mask.c). Some GB/s.
- CBC decrypts all sectors in one call, as if they were one message. Only the first block of each
  sector comes out wrong then: XORed with the ciphertext before it instead of its IV. Those are
  mended together. Encryption is one call for each sector: each block needs the one before.

Lengths are multiples of the cipher's block; the last sector may be short.

Context: any thread; a cipher may be used by several at once.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from blockemu.drivers.crypto._xts_mask import ffi, lib

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm

SECTOR: Final = 512
_AES_BLOCK: Final = 16

IvGenerator = Callable[[int, int], bytearray]
"""`(first sector, sectors)` -> their IVs, one behind the other."""


class SectorCipher(ABC):
    """Encrypts and decrypts sectors, by their numbers. Its key appears in no repr."""

    @abstractmethod
    def encrypt(self, sector: int, source: memoryview, target: memoryview) -> None:
        """Encrypt the sectors `source`, from number `sector` on, into `target` of equal length."""

    @abstractmethod
    def decrypt(self, sector: int, view: memoryview) -> None:
        """Decrypt the sectors in `view` in place."""


class XtsCipher(SectorCipher):
    """AES in XTS mode. `key`: both halves, 32 or 64 bytes."""

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        half = len(key) // 2
        self._blocks = EcbContexts(AES(key[:half]))
        self._tweaks = EcbContexts(AES(key[half:]))
        self._ivs = ivs

    def encrypt(self, sector: int, source: memoryview, target: memoryview) -> None:
        with ffi.from_buffer(source) as plain, ffi.from_buffer(target) as coded:
            self._run(sector, plain, coded, target, decrypt=False)

    def decrypt(self, sector: int, view: memoryview) -> None:
        with ffi.from_buffer(view) as data:
            self._run(sector, data, data, view, decrypt=True)

    def _run(
        self, sector: int, source: object, target: object, view: memoryview, *, decrypt: bool
    ) -> None:
        length = len(view)
        assert length % SECTOR == 0, "XTS keys and sectors make whole sectors"
        count = length // SECTOR
        tweaks = self._ivs(sector, count)
        self._tweaks.run(memoryview(tweaks), decrypt=False)
        with ffi.from_buffer(tweaks) as masks:
            lib.xts_mask(masks, count, SECTOR, source, target)
            self._blocks.run(view, decrypt=decrypt)
            lib.xts_mask(masks, count, SECTOR, target, target)


class CbcCipher(SectorCipher):
    """Any block cipher in CBC mode."""

    def __init__(self, algorithm: BlockCipherAlgorithm, ivs: IvGenerator) -> None:
        self._algorithm = algorithm
        self._block = algorithm.block_size // 8
        self._ivs = ivs

    def encrypt(self, sector: int, source: memoryview, target: memoryview) -> None:
        block = self._block
        ivs = self._ivs(sector, -(-len(source) // SECTOR))
        for index, start in enumerate(range(0, len(source), SECTOR)):
            iv = bytes(ivs[index * block : (index + 1) * block])
            context = Cipher(self._algorithm, modes.CBC(iv)).encryptor()
            part = source[start : start + SECTOR]
            target[start : start + len(part)] = context.update(part)

    def decrypt(self, sector: int, view: memoryview) -> None:
        block = self._block
        ivs = self._ivs(sector, -(-len(view) // SECTOR))
        # What each sector's first block will be XORed with, and what it should be.
        chained = bytes(ivs[:block]) + b"".join(
            view[end - block : end] for end in range(SECTOR, len(view), SECTOR)
        )
        context = Cipher(self._algorithm, modes.CBC(chained[:block])).decryptor()
        _update_in_place(context, view, block)
        wrong = int.from_bytes(chained, "little") ^ int.from_bytes(ivs, "little")
        mending = memoryview(wrong.to_bytes(len(chained), "little")).cast("Q")
        words = view.cast("B").cast("Q")
        step, width = SECTOR // 8, block // 8
        for word in range(width):
            first = int.from_bytes(words[word::step].tobytes(), "little")
            mend = int.from_bytes(mending[word::width].tobytes(), "little")
            count = len(mending[word::width])
            words[word::step] = memoryview((first ^ mend).to_bytes(count * 8, "little")).cast("Q")


class EcbCipher(SectorCipher):
    """Each block by itself: no IVs. Only for images that others made so."""

    def __init__(self, algorithm: BlockCipherAlgorithm) -> None:
        self._contexts = EcbContexts(algorithm)

    def encrypt(self, sector: int, source: memoryview, target: memoryview) -> None:
        target[:] = source
        self._contexts.run(target, decrypt=False)

    def decrypt(self, sector: int, view: memoryview) -> None:
        self._contexts.run(view, decrypt=True)


class CtrCipher(SectorCipher):
    """AES as a stream, a counter block from each sector's IV on."""

    def __init__(self, algorithm: AES, ivs: IvGenerator) -> None:
        self._algorithm = algorithm
        self._ivs = ivs

    def encrypt(self, sector: int, source: memoryview, target: memoryview) -> None:
        ivs = self._ivs(sector, -(-len(source) // SECTOR))
        for index, start in enumerate(range(0, len(source), SECTOR)):
            iv = bytes(ivs[index * _AES_BLOCK : (index + 1) * _AES_BLOCK])
            part = source[start : start + SECTOR]
            context = Cipher(self._algorithm, modes.CTR(iv)).encryptor()
            target[start : start + len(part)] = context.update(part)

    def decrypt(self, sector: int, view: memoryview) -> None:
        self.encrypt(sector, view, view)


class EcbContexts:
    """Contexts of one key in ECB mode, made once and used again: they keep nothing between calls
    on whole blocks. A list that threads pop from and append to needs no lock."""

    def __init__(self, algorithm: BlockCipherAlgorithm) -> None:
        self._cipher = Cipher(algorithm, modes.ECB())
        self._block = algorithm.block_size // 8
        self._idle: dict[bool, list[CipherContext]] = {True: [], False: []}

    def run(self, view: memoryview, *, decrypt: bool) -> None:
        """Encrypt or decrypt whole blocks in place."""
        idle = self._idle[decrypt]
        try:
            context = idle.pop()
        except IndexError:
            context = self._cipher.decryptor() if decrypt else self._cipher.encryptor()
        _update_in_place(context, view, self._block)
        idle.append(context)


def _update_in_place(context: CipherContext, view: memoryview, block: int) -> None:
    """`update_into` wants room for all but a byte of one more block, so the last one goes alone."""
    body = len(view) - block
    last = bytes(view[body:])
    if body:
        context.update_into(view[:body], view)
    view[body:] = context.update(last)


# --- IVs ---


def numbers(first: int, count: int, *, block: int, mask: int = 2**64 - 1) -> bytearray:
    """The numbers of sectors, little endian, each filled up with zeroes to a block."""
    width = block // 8
    words = array("Q", bytes(count * block))
    words[::width] = array("Q", (number & mask for number in range(first, first + count)))
    if sys.byteorder == "big":
        words.byteswap()
    return bytearray(words)
