# SPDX-License-Identifier: Apache-2.0
"""READs around holes: zeroes that the graph knows of travel as twelve bytes instead of themselves.

Only where replies have chunks, the client didn't ask for one piece (DF), and the answer is free:
the tables of a format that a read looks at anyway (drivers/known_zeroes.py). A raw file isn't asked
for its holes: each question is a system call, and clients that copy ask for block status anyway.

Small READs aren't looked at either. Looking takes some microseconds; moving zeroes takes as long
for about 32 KiB of them, so below SPARSE_BYTES_MIN there is nothing to win, and what isn't zeroes
would lose. Plain READs never come here: the direct map serves them.

Source: "Structured reply types"; a reply has at most 2 * HOLES_MAX + 1 content chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.loop.sync import gather
from blockemu.nbd.commands import DF
from blockemu.nbd.reply_style import StructuredStyle

if TYPE_CHECKING:
    from blockemu.nbd.request import Request

SPARSE_BYTES_MIN: Final = 64 * 1024
"""Shorter READs are answered as a whole."""

HOLE_BYTES_MIN: Final = 32 * 1024
"""Shorter holes are read: a chunk costs both sides more than it saves."""

HOLES_MAX: Final = 64
"""Holes of one reply; what is behind them is read. Clients remember each chunk."""

PIECES_AT_ONCE: Final = 16
"""Pieces between the holes that are read side by side."""


class PieceError(OSError):
    """A piece couldn't be read: `at` is where it begins, and the bytes before it are fine."""

    def __init__(self, error: OSError, at: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.at = at


def may_have_holes(request: Request) -> bool:
    """Whether it is worth looking for them in this READ."""
    connection = request.connection
    return (
        connection.style.structured
        and request.length >= SPARSE_BYTES_MIN
        and not request.flags & DF
        and connection.export.backend.may_tell_zeroes(request.offset, request.length)
    )


async def read_around_holes(request: Request) -> list[bytes | memoryview] | None:
    """The whole reply to a READ, its data in `request.buffer`; None: there is no hole in it, and
    nothing has been read.

    Suspends: inside the backend. Raises: OSError; PieceError, where it is known where.
    """
    connection, offset, length = request.connection, request.offset, request.length
    backend, style = connection.export.backend, connection.style
    assert isinstance(style, StructuredStyle)
    holes = (await backend.known_zeroes(offset, length, worth=HOLE_BYTES_MIN))[:HOLES_MAX]
    if not holes:
        return None
    pieces = _between(holes, offset, offset + length)
    if pieces and request.buffer is None:
        request.buffer = connection.pool.take(length)
    for start in range(0, len(pieces), PIECES_AT_ONCE):
        batch = pieces[start : start + PIECES_AT_ONCE]
        await gather(*(_read_piece(request, at, size) for at, size in batch))
    answer: list[bytes | memoryview] = []
    end = offset + length
    for at, size in sorted(holes + pieces):
        done = at + size == end
        if (at, size) in holes:
            answer.append(style.hole(request.cookie, offset, at=at, length=size, done=done))
        else:
            head = style.data_head(request.cookie, offset, at=at, length=size, done=done)
            answer += (head, _view(request, at, size))
    return answer


def _between(holes: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of the range isn't in a hole."""
    pieces = []
    for at, size in holes:
        if at > start:
            pieces.append((start, at - start))
        start = at + size
    if end > start:
        pieces.append((start, end - start))
    return pieces


def _view(request: Request, at: int, size: int) -> memoryview:
    assert request.buffer is not None
    start = at - request.offset
    return request.buffer.view[start : start + size]


async def _read_piece(request: Request, at: int, size: int) -> None:
    try:
        await request.connection.export.backend.preadv(at, _view(request, at, size))
    except OSError as error:
        raise PieceError(error, at) from error
