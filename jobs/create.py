# SPDX-License-Identifier: Apache-2.0
"""The create job: makes a new image, through the drivers.

The file is opened as a node first, with its image lock, so that an image which somebody uses is
refused before a byte of it is lost. A file that this job has made is removed again when the job
fails; one that was there before stays, with whatever it then holds, as it does with qemu-img.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.crypto import luks_volume
from blockemu.drivers.crypto.create_options import take_new_volume
from blockemu.drivers.crypto.luks_volume import NewVolume
from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import path_to_create, resolve
from blockemu.drivers.qcow2.create import create as qcow2_create
from blockemu.drivers.qcow2.create_options import CreateOptions
from blockemu.drivers.sector import sectors_up
from blockemu.jobs.job import Job

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener

FormatWriter = Callable[["BlockDriverState", "BlockDriverState | None"], Awaitable[None]]
"""Writes an empty image of some format into a file's node, and into that of its data file."""

SECTOR_BYTES = 512
"""Sizes of new images are rounded up to whole sectors, as qemu-img does."""

RAW_PREALLOCATIONS = ("off", "falloc", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage:
    """What is to be made. `options` are the format's own, under qemu-img's names; `cache` that of
    the file's node: an image that need not outlive a power cut needn't be flushed."""

    path: str
    fmt: str
    size_bytes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)


class CreateJob(Job):
    """Context: the main context, which is where graphs are opened."""

    kind: ClassVar[str] = "create"

    def __init__(self, job_id: str, image: NewImage, *, opener: Opener, **kwargs: Any) -> None:
        super().__init__(job_id, main_ctx=opener.ctx, **kwargs)
        self.image = image
        self._opener = opener
        self._made_files: list[str] = []

    async def work(self) -> None:
        """Make the image. Raises: ImageError."""
        path = self.image.path
        if self.image.fmt not in _FORMATS:
            known = ", ".join(sorted(_FORMATS))
            raise ImageError(path, f"can't create format '{self.image.fmt}'; known: {known}")
        write_format = _FORMATS[self.image.fmt](self.image, self._opener)
        self.add_work(1)
        try:
            await self._create(write_format)
        except OSError as error:
            raise ImageError.from_os_error(path, error) from error
        self.work_done(1)

    async def _create(self, write_format: FormatWriter) -> None:
        path = self.image.path
        data_path = self._data_path()
        async with self._new_file(path) as node:
            if data_path is None:
                await self.pause_point()
                await write_format(node, None)
                return
            if os.path.realpath(path) == os.path.realpath(data_path):
                raise ImageError(path, "an image can't be its own data file")
            async with self._new_file(data_path) as data:
                await self.pause_point()
                await write_format(node, data)

    def _data_path(self) -> str | None:
        """Where the header's name for it will lead to: relative to the image."""
        name = self.image.options.get("data_file")
        if self.image.fmt != "qcow2" or name is None:
            return None
        return path_to_create(resolve(name, above=self.image.path, what="data file"))

    @asynccontextmanager
    async def _new_file(self, path: str) -> AsyncIterator[BlockDriverState]:
        """Made, if it isn't there, and open inside the block."""
        self._make_file(path)
        cache = dict(self.image.cache)
        node = await self._opener.open(
            {"driver": "file", "filename": path, "aio": "threads", "cache": cache}
        )
        try:
            backend = BlockBackend(path, node, writable=True)
        except BaseException:
            await node.close()
            raise
        try:
            yield node
        finally:
            await backend.close()

    def _make_file(self, path: str) -> None:
        existed = os.path.lexists(path)
        try:
            self._opener.files.open(
                path, read_only=False, direct=False, aio="threads", create=True
            ).close()
        except OSError as error:
            raise ImageError.from_os_error(path, error) from error
        if not existed:
            self._made_files.append(path)

    def abort(self) -> None:
        """Leave no half-made files behind."""
        for path in self._made_files:
            try:
                os.unlink(path)
            except OSError:
                pass


def _raw_writer(image: NewImage, opener: Opener) -> FormatWriter:
    """A raw image is its size. Raises: ImageError, for options that can't be."""
    options = dict(image.options)
    preallocation = options.pop("preallocation", None) or "off"
    if preallocation not in RAW_PREALLOCATIONS:
        known = ", ".join(RAW_PREALLOCATIONS)
        raise ImageError(
            image.path, f"format raw has no preallocation '{preallocation}'; it has {known}"
        )
    if options:
        raise ImageError(image.path, f"format raw has no option '{next(iter(options))}'")
    length = -(-image.size_bytes // SECTOR_BYTES) * SECTOR_BYTES

    async def write(node: BlockDriverState, data: BlockDriverState | None) -> None:
        file = node.driver.host_file
        if file is not None and file.is_block_device:
            if length > node.length_bytes:
                raise ImageError(image.path, f"has {node.length_bytes} bytes, fewer than {length}")
            return
        await node.truncate(0)
        await node.truncate(length, preallocation=preallocation)

    return write


def _qcow2_writer(image: NewImage, opener: Opener) -> FormatWriter:
    options = CreateOptions.parse(image.path, image.size_bytes, image.options)
    new_luks = None
    if options.encryption is not None:
        new_luks = luks_maker(image.path, options.encryption, options.key_secret, opener)

    async def write(node: BlockDriverState, data: BlockDriverState | None) -> None:
        area = await new_luks() if new_luks is not None else b""
        await qcow2_create(node, image.path, options, data=data, luks_area=area)

    return write


def _luks_writer(image: NewImage, opener: Opener) -> FormatWriter:
    """A LUKS volume is its header and key material, and room for the payload."""
    rest = dict(image.options)
    secret_id = rest.pop("key-secret", None)
    new = take_new_volume(image.path, rest)
    if rest:
        raise ImageError(image.path, f"format luks has no option '{next(iter(rest))}'")
    new_luks = luks_maker(image.path, new, secret_id, opener)
    length = new.payload_bytes() + sectors_up(image.size_bytes)

    async def write(node: BlockDriverState, data: BlockDriverState | None) -> None:
        area = await new_luks()
        file = node.driver.host_file
        if file is None or not file.is_block_device:
            await node.truncate(0)
            await node.truncate(length)
        elif length > node.length_bytes:
            raise ImageError(image.path, f"has {node.length_bytes} bytes, fewer than {length}")
        await node.pwritev(0, memoryview(area))
        await node.flush()

    return write


def luks_maker(
    name: str, new: NewVolume, secret_id: str | None, opener: Opener
) -> Callable[[], Awaitable[bytes]]:
    """Looks the secret up, and returns what computes the new volume's header area, in seconds.

    Raises: ImageError: no secret.
    """
    if not secret_id:
        raise ImageError(name, "an encrypted image needs a secret: option 'key-secret' names it")
    passphrase = opener.secrets.find(name, secret_id)

    async def make() -> bytes:
        create = partial(luks_volume.create, entropy=opener.entropy)
        _, area, _ = await opener.offload(create, name, new, passphrase)
        return area

    return make


_FORMATS: dict[str, Callable[[NewImage, Opener], FormatWriter]] = {
    "luks": _luks_writer,
    "raw": _raw_writer,
    "qcow2": _qcow2_writer,
}
"""Checks the options before anything is touched, and returns what writes the format."""
