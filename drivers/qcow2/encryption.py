# SPDX-License-Identifier: Apache-2.0
"""Encrypted images (specification: Data encryption, Full disk encryption header pointer).

Only the guest's data clusters are encrypted; tables and compressed clusters are not.

- LUKS (crypt_method 2): a LUKS header lies in clusters of its own, which a header extension names.
  A sector's number, from which its IV is made, is that of its place in the *file*.
- AES (crypt_method 1), legacy: the passphrase itself, cut off or filled up to 16 bytes, is the key
  of AES-128-CBC, and the sector's number that on the *guest's* disk. Nothing in the image tells a
  wrong passphrase from the right one, so such images are read, and never written.

The option is `encrypt.key-secret`, the id of a secret. An image that is opened only to be described
needs none; it is *locked* then.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from blockemu.drivers.crypto import luks_header, luks_volume
from blockemu.drivers.crypto.cipher_spec import CipherSpec
from blockemu.drivers.crypto.luks_header import LuksHeader
from blockemu.drivers.crypto.offload import Offload, on_thread_pool
from blockemu.drivers.crypto.sector_cipher import SECTOR, SectorCipher
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.options import refuse_unknown, take_choice, take_dict, take_str
from blockemu.drivers.qcow2.guest_data import GuestData
from blockemu.drivers.qcow2.layout import round_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.qcow2.header import Header
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.overlap_check import OverlapCheck
    from blockemu.drivers.registry import Opener
    from blockemu.loop.buffers import BufferPool
    from blockemu.loop.host_file import HostFile

AES: Final = 1
LUKS: Final = 2
METHODS: Final = {AES: "aes", LUKS: "luks"}
"""`crypt_method` in the header, and QEMU's names."""

AES_KEY_BYTES: Final = 16

OFFLOAD_BYTES: Final = 128 * 1024
"""From this length on a thread does it: a hop costs 50 us, in which 64 KiB are encrypted."""


class Encryption(NamedTuple):
    """An image's encryption. `cipher` None: locked. `luks`: its header, where it has one."""

    method: int
    luks: LuksHeader | None
    cipher: SectorCipher | None
    offload: Offload = on_thread_pool

    def __repr__(self) -> str:
        return f"<Encryption {METHODS[self.method]}>"

    def describe(self) -> dict[str, Any]:
        """Qcow2's part of `img info`, under QEMU's names and in its order."""
        if self.luks is None:
            return {"format": METHODS[self.method]}
        facts: dict[str, Any] = {}
        for key, value in luks_volume.describe(self.luks).items():
            if key == "cipher-mode":
                facts["format"] = METHODS[self.method]
            facts[key] = value
        return facts

    def guest_data(
        self, file: ImageFile, overlaps: OverlapCheck, buffers: Callable[[], BufferPool]
    ) -> GuestData:
        """The door that encrypts and decrypts."""
        return EncryptedData(file, self, overlaps=overlaps, buffers=buffers)


class EncryptedData(GuestData):
    """The guest's bytes lie in `file` encrypted, each sector by itself."""

    keeps_zeroes = False

    def __init__(
        self,
        file: ImageFile,
        encryption: Encryption,
        *,
        overlaps: OverlapCheck,
        buffers: Callable[[], BufferPool],
    ) -> None:
        super().__init__(file, overlaps)
        self._cipher = encryption.cipher
        self._by_host = encryption.method == LUKS
        self._offload = encryption.offload
        self._buffers = buffers

    async def read(self, host: int, view: memoryview, guest: int) -> None:
        cipher = self._unlocked()
        length = len(view)
        if length % SECTOR:  # the end of a disk that ends inside a sector
            buffer = bytearray(round_up(length, SECTOR))
            await self.read(host, memoryview(buffer), guest)
            view[:] = buffer[:length]
            return
        await self.file.read(host, view)
        sector = (host if self._by_host else guest) // SECTOR
        if length < OFFLOAD_BYTES:
            cipher.decrypt(sector, view)
        else:
            await self._offload(cipher.decrypt, sector, view)

    async def write(self, host: int, view: memoryview, guest: int) -> None:
        cipher = self._unlocked()
        whole = round_up(len(view), SECTOR)
        buffers = self._buffers()
        buffer = buffers.take(whole)
        try:
            coded = buffer.view[:whole]
            if whole > len(view):
                view = memoryview(bytes(view).ljust(whole, b"\0"))
            sector = (host if self._by_host else guest) // SECTOR
            if whole < OFFLOAD_BYTES:
                cipher.encrypt(sector, view, coded)
            else:
                await self._offload(cipher.encrypt, sector, view, coded)
            await super().write(host, coded, guest)
        finally:
            buffers.give(buffer)

    def _unlocked(self) -> SectorCipher:
        if self._cipher is None:
            raise io_error(errno.EACCES, f"{self.file.name}: encrypted, and opened without a key")
        return self._cipher

    @property
    def mapped_file(self) -> HostFile | None:
        return None


async def open_encryption(
    name: str,
    header: Header,
    child: BdrvChild,
    *,
    node: BlockDriverState,
    options: dict[str, Any],
    opener: Opener,
) -> Encryption | None:
    """How the image is encrypted; unlocked, unless `node` does no I/O of the guest's.

    Takes `encrypt` out of `options`: `format` and `key-secret`.
    Suspends: while a thread computes; seconds, for LUKS. Raises: ImageError; OSError of the file.
    """
    own = take_dict(name, options, "encrypt")
    method = header.crypt_method
    if not method:
        if own:
            raise ImageError(name, "the image is not encrypted, so it takes no option 'encrypt'")
        return None
    wanted = take_choice(name, own, "format", tuple(METHODS.values()), METHODS[method])
    if wanted != METHODS[method]:
        raise ImageError(name, f"the image is encrypted by {METHODS[method]}, not by {wanted}")
    secret_id = take_str(name, own, "key-secret", None)
    refuse_unknown(name, own, "qcow2")
    locked = node.no_io
    passphrase = b""
    if not locked:
        if secret_id is None:
            raise ImageError(
                name, "the image is encrypted: option 'encrypt.key-secret' must name its secret"
            )
        passphrase = opener.secrets.find(name, secret_id)
    if method == AES:
        found = _open_aes(name, passphrase, locked=locked, read_only=node.read_only)
        return found._replace(offload=opener.offload)
    area = await read_luks_area(name, header, child)
    luks = luks_header.parse(name, area)
    if locked:
        return Encryption(LUKS, luks, None)
    key = await opener.offload(luks_volume.unlock, name, luks, area, passphrase)
    return Encryption(LUKS, luks, luks.spec.cipher(key), opener.offload)


def _open_aes(name: str, passphrase: bytes, *, locked: bool, read_only: bool) -> Encryption:
    if locked:
        return Encryption(AES, None, None)
    if not read_only:
        raise ImageError(
            name, "AES encryption is legacy: such an image can only be opened read-only "
            "(copy it to a new one with: blockemu img convert)",
        )  # fmt: skip
    spec = CipherSpec.from_options(name, "aes-128", "cbc", "plain64", None)
    key = passphrase[:AES_KEY_BYTES].ljust(AES_KEY_BYTES, b"\0")
    return Encryption(AES, None, spec.cipher(key))


async def read_luks_area(name: str, header: Header, child: BdrvChild) -> bytes:
    """The clusters that the header extension names. Raises: ImageError; OSError."""
    place = header.crypto_area
    assert place is not None, "the header was judged"
    area = bytearray(min(place.length, max(child.length_bytes - place.offset, 0)))
    if area:
        await child.preadv(place.offset, memoryview(area))
    return bytes(area)
