# SPDX-License-Identifier: Apache-2.0
"""`img compare`: whether two images show the guest the same bytes, by qemu-img's rules.

What both say by block status to be zeroes isn't read, and of what one of them says so only the
other is. A longer image is the same as a shorter one if it is zero behind its end.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blockemu.drivers.chain_status import chain_status
from blockemu.drivers.driver import BlockStatus
from blockemu.drivers.errors import ImageError
from blockemu.drivers.sector import SECTOR_BYTES, sectors_up
from blockemu.img.session import open_image, run_session
from blockemu.loop.memory_scan import equal_length, zero_and_data_runs
from blockemu.loop.sync import gather, yield_now

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.registry import Opener

READ_BYTES: Final = 2 << 20
"""Read of each image at a time: large enough for a disk, small enough for the CPU's cache."""

Progress = Callable[[int, int], None]
"""Told (bytes that are done, bytes in all)."""


class Verdict(enum.Enum):
    """How a comparison ended; the value is the exit status."""

    IDENTICAL = 0
    DIFFERENT = 1


class Failure(enum.IntEnum):
    """Where a comparison failed; the value is the exit status."""

    OPEN = 2
    STATUS = 3
    READ = 4


class CompareError(ImageError):
    """No verdict. `failure` says at which step."""

    def __init__(self, name: str, reason: str, failure: Failure) -> None:
        super().__init__(name, reason)
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """Two images. `strict`: also of the same size, and allocated alike."""

    paths: tuple[str, str]
    fmts: tuple[str | None, str | None] = (None, None)
    strict: bool = False
    cache: str = "writeback"
    force_share: bool = False


def compare_images(
    request: CompareRequest, *, say: Callable[[str], None], progress: Progress
) -> Verdict:
    """Compare, and tell `say` the result in qemu-img's words.

    Context: the main thread, in which no loop runs. Raises: CompareError.
    """

    async def work(opener: Opener) -> Verdict:
        async with AsyncExitStack() as stack:
            one, other = [
                await _open(stack, opener, request, path, fmt)
                for path, fmt in zip(request.paths, request.fmts, strict=True)
            ]
            return await Comparison(one, other, say, progress).run(strict=request.strict)

    return run_session(work)


async def _open(
    stack: AsyncExitStack, opener: Opener, request: CompareRequest, path: str, fmt: str | None
) -> BlockBackend:
    try:
        return await stack.enter_async_context(
            open_image(opener, path, fmt=fmt, cache=request.cache, force_share=request.force_share)
        )
    except ImageError as error:
        raise CompareError(error.name, error.reason, Failure.OPEN) from error


class Comparison:
    """One comparison of two open images. Context: home thread of their context."""

    def __init__(
        self,
        one: BlockBackend,
        other: BlockBackend,
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self._images = (one, other)
        self._lengths = tuple(sectors_up(image.length_bytes) for image in self._images)
        self._say = say
        self._progress = progress

    async def run(self, *, strict: bool) -> Verdict:
        """Suspends: for I/O. Raises: CompareError."""
        shorter, longer = sorted(self._lengths)
        if strict and shorter != longer:
            self._say("Strict mode: Image size mismatch!")
            return Verdict.DIFFERENT
        offset = 0
        while offset < shorter:
            length = await self._compare_next(offset, shorter - offset, strict=strict)
            if length is None:
                return Verdict.DIFFERENT
            offset += length
            self._progress(offset, longer)
            await yield_now()
        if shorter != longer:
            self._say("Warning: Image size mismatch!")
            if not await self._rest_is_zero(shorter, longer):
                return Verdict.DIFFERENT
        self._say("Images are identical.")
        return Verdict.IDENTICAL

    async def _compare_next(self, offset: int, length: int, *, strict: bool) -> int | None:
        """Compare some bytes from `offset` on; how many they were, or None if they differ."""
        one, other = self._images
        statuses = [await _status(image, offset, length) for image in self._images]
        length = min(status.length for status in statuses)
        if strict and _shape(statuses[0]) != _shape(statuses[1]):
            self._say(f"Strict mode: Offset {offset} block status mismatch!")
            return None
        zero = [status.zero for status in statuses]
        if all(zero):
            return length
        length = min(length, READ_BYTES)
        if any(zero):
            same = await self._is_zero(one if zero[1] else other, offset, length)
        else:
            same = await self._is_same(offset, length)
        return length if same else None

    async def _rest_is_zero(self, offset: int, end: int) -> bool:
        image = self._images[self._lengths.index(end)]
        while offset < end:
            status = await _status(image, offset, end - offset)
            length = status.length
            if not status.zero:
                length = min(length, READ_BYTES)
                if not await self._is_zero(image, offset, length):
                    return False
            offset += length
            self._progress(offset, end)
            await yield_now()
        return True

    async def _is_zero(self, image: BlockBackend, offset: int, length: int) -> bool:
        pool = image.ctx.buffers
        buffer = pool.take(length)
        try:
            view = buffer.view[:length]
            await _read(image, offset, view)
            for run in zero_and_data_runs(view, offset=0, granule=SECTOR_BYTES):
                if not run.is_zero:
                    return self._mismatch(offset + run.start)
        finally:
            pool.give(buffer)
        return True

    async def _is_same(self, offset: int, length: int) -> bool:
        one, other = self._images
        pool = one.ctx.buffers
        buffers = pool.take(length), pool.take(length)
        try:
            views = [buffer.view[:length] for buffer in buffers]
            await gather(_read(one, offset, views[0]), _read(other, offset, views[1]))
            same = equal_length(views[0], views[1])
        finally:
            for buffer in buffers:
                pool.give(buffer)
        return same == length or self._mismatch(offset + same // SECTOR_BYTES * SECTOR_BYTES)

    def _mismatch(self, offset: int) -> bool:
        """Tell the sector that differs first. Always False."""
        self._say(f"Content mismatch at offset {offset}!")
        return False


def _shape(status: BlockStatus) -> tuple[bool, bool, bool, bool]:
    """What of a status strict mode wants to be alike."""
    return status.data, status.zero, status.allocated, status.host_offset is not None


async def _status(image: BlockBackend, offset: int, length: int) -> BlockStatus:
    inside = min(length, image.length_bytes - offset)
    if inside <= 0:
        return BlockStatus(length, data=False, zero=True, host_offset=offset)
    try:
        return await chain_status(image.node, offset, inside)
    except OSError as error:
        found = ImageError.from_os_error(image.name, error)
        raise CompareError(found.name, found.reason, Failure.STATUS) from error


async def _read(image: BlockBackend, offset: int, view: memoryview) -> None:
    try:
        await image.preadv(offset, view)
    except OSError as error:
        found = ImageError.from_os_error(image.name, error)
        raise CompareError(found.name, found.reason, Failure.READ) from error
