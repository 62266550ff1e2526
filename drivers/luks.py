# SPDX-License-Identifier: Apache-2.0
"""luks: a LUKS volume, version 1, over the file below: header and key material, then the payload.

A sector's number, from which its IV is made, counts from the payload's start. Options: `file`;
`key-secret`, the id of the secret that unlocks it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Self

from blockemu.drivers.child import Role
from blockemu.drivers.crypto import luks_header, luks_volume
from blockemu.drivers.crypto.sector_cipher import SECTOR, SectorCipher
from blockemu.drivers.driver import BlockDriver, RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.options import take_str

if TYPE_CHECKING:
    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.crypto.luks_header import LuksHeader
    from blockemu.drivers.crypto.offload import Offload
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener

OFFLOAD_BYTES = 128 * 1024
"""From this length on a thread does it."""


class LuksDriver(BlockDriver):
    """The payload, decrypted. `cipher` None: locked."""

    name = "luks"
    supports_fua = True
    keeps_zeroes = False

    def __init__(
        self,
        node: BlockDriverState,
        file: BdrvChild,
        header: LuksHeader,
        cipher: SectorCipher | None,
        offload: Offload,
    ) -> None:
        super().__init__(node)
        self._file = file
        self._header = header
        self._cipher = cipher
        self._offload = offload
        self._start = header.payload_bytes

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        perm, shared = opener.file_permissions(node)
        file = await opener.open_child(
            node, "file", options.pop("file", None), role=Role.DATA, perm=perm, shared=shared
        )
        name = node.filename or node.node_name
        secret_id = take_str(name, options, "key-secret", None)
        options.pop("backing", None)  # info and the like say that there is none
        try:
            header, area = await _read_area(name, file)
        except OSError as error:
            raise ImageError.from_os_error(name, error) from error
        if file.length_bytes < header.payload_bytes:
            raise ImageError(name, "the file ends before the LUKS payload: it is truncated")
        cipher = None
        if not node.no_io:
            if secret_id is None:
                raise ImageError(
                    name, "the volume is encrypted: option 'key-secret' must name its secret"
                )
            passphrase = opener.secrets.find(name, secret_id)
            key = await opener.offload(luks_volume.unlock, name, header, area, passphrase)
            cipher = header.spec.cipher(key)
        return cls(node, file, header, cipher, opener.offload)

    @classmethod
    def recognises(cls, start: bytes) -> bool:
        return luks_header.recognises(start)

    @property
    def request_alignment(self) -> int:
        return SECTOR

    @property
    def length_bytes(self) -> int:
        return (self._file.length_bytes - self._start) // SECTOR * SECTOR

    @property
    def payload_offset(self) -> int:
        """Bytes of header and key material, before the payload."""
        return self._start

    async def preadv(self, offset: int, view: memoryview) -> None:
        cipher = self._unlocked()
        await self._file.preadv(self._start + offset, view)
        if len(view) < OFFLOAD_BYTES:
            cipher.decrypt(offset // SECTOR, view)
        else:
            await self._offload(cipher.decrypt, offset // SECTOR, view)

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        cipher = self._unlocked()
        buffers = self.node.ctx.buffers
        buffer = buffers.take(len(view))
        try:
            coded = buffer.view[: len(view)]
            if len(view) < OFFLOAD_BYTES:
                cipher.encrypt(offset // SECTOR, view, coded)
            else:
                await self._offload(cipher.encrypt, offset // SECTOR, view, coded)
            await self._file.pwritev(self._start + offset, coded, flags)
        finally:
            buffers.give(buffer)

    async def flush(self) -> None:
        await self._file.flush()

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        if length % SECTOR:
            raise io_error(errno.EINVAL, f"{length} bytes aren't whole sectors")
        await self._file.truncate(self._start + length, preallocation=preallocation)

    def info(self) -> dict[str, Any]:
        return {
            "encrypted": True,
            "format-specific": {"type": "luks", "data": luks_volume.describe(self._header)},
        }

    def _unlocked(self) -> SectorCipher:
        if self._cipher is None:
            name = self.node.filename or self.node.node_name
            raise io_error(errno.EACCES, f"{name}: encrypted, and opened without a key")
        return self._cipher


async def _read_area(name: str, file: BdrvChild) -> tuple[LuksHeader, bytes]:
    """The header, and all that lies before the payload. Raises: ImageError; OSError."""
    start = bytearray(min(luks_header.HEADER_BYTES, file.length_bytes))
    if start:
        await file.preadv(0, memoryview(start))
    header = luks_header.parse(name, bytes(start))
    area = bytearray(min(header.payload_bytes, file.length_bytes))
    await file.preadv(0, memoryview(area))
    return header, bytes(area)
