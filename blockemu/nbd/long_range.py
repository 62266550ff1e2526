# SPDX-License-Identifier: Apache-2.0
"""TRIM, WRITE_ZEROES and CACHE: requests on ranges, which may be longer than any memory.

With extended headers one request may be about a whole disk. The graph would work through it in one
go, and nobody else's requests on this thread would get a turn. So long ranges are cut into pieces,
between which the loop goes round; the pieces grow with the range, so that their number is bounded.
Like any request of that length, one in pieces isn't atomic.

A CACHE request is a hint, for which the document asks nothing in particular: the first
`PREFETCH_BYTES_MAX` of the range are read, and forgotten. What lies below, such as a page cache,
may keep them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.sync import yield_now
from blockemu.nbd.commands import CACHE, FAST_ZERO, FUA, NO_HOLE, TRIM, WRITE_ZEROES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blockemu.nbd.request import Request

PIECE_BYTES: Final = 256 << 20
"""4096 clusters of qcow2's usual size, whose entries are changed in one or two milliseconds."""

PIECES_MAX: Final = 4096
"""Of one request: from 1 TiB on the pieces are longer. What long ranges of huge disks usually have
in their tables is nothing at all, and that is skipped by the gibibyte."""

PREFETCH_BYTES: Final = 1 << 20
"""What a CACHE request reads at once: all the memory that it takes."""

PREFETCH_BYTES_MAX: Final = 32 << 20
"""What it reads in all: as much as a READ could."""


async def carry_out(request: Request) -> None:
    """The range commands, of one byte at least. Suspends: inside the backend, and between pieces.
    Raises: OSError; what was done of the range isn't known then."""
    if request.command == TRIM:
        await _trim(request)
    elif request.command == WRITE_ZEROES:
        await _write_zeroes(request)
    else:
        assert request.command == CACHE, request.command
        await _prefetch(request)


async def _trim(request: Request) -> None:
    backend = request.connection.export.backend
    await _in_pieces(request, backend.pdiscard)
    if request.flags & FUA:
        await backend.flush()


async def _write_zeroes(request: Request) -> None:
    backend = request.connection.export.backend
    flags = RequestFlags.NONE
    if not request.flags & NO_HOLE:
        flags |= RequestFlags.MAY_UNMAP
    if request.flags & FAST_ZERO:
        flags |= RequestFlags.NO_FALLBACK
    if request.length <= PIECE_BYTES:
        if request.flags & FUA:
            flags |= RequestFlags.FUA
        await backend.pwrite_zeroes(request.offset, request.length, flags)
        return
    await _in_pieces(request, lambda offset, size: backend.pwrite_zeroes(offset, size, flags))
    if request.flags & FUA:
        await backend.flush()


async def _prefetch(request: Request) -> None:
    connection, offset = request.connection, request.offset
    end = offset + min(request.length, PREFETCH_BYTES_MAX)
    buffer = connection.pool.take(min(PREFETCH_BYTES, end - offset))
    try:
        while offset < end and connection.wants_answers:
            piece = min(PREFETCH_BYTES, end - offset)
            await connection.export.backend.preadv(offset, buffer.view[:piece])
            offset += piece
            await yield_now()
    finally:
        connection.pool.give(buffer)


async def _in_pieces(request: Request, do: Callable[[int, int], Awaitable[None]]) -> None:
    """Have `do` see to the range, (offset, length) at a time, as long as the client is there."""
    offset, end = request.offset, request.offset + request.length
    size = max(PIECE_BYTES, -(-request.length // PIECES_MAX) + 65535 & ~65535)
    while offset < end and request.connection.wants_answers:
        # Up to a multiple of the size, so that the seams are at cluster boundaries.
        length = min(size - offset % size, end - offset)
        await do(offset, length)
        offset += length
        if offset < end:
            await yield_now()
