# SPDX-License-Identifier: Apache-2.0
"""BLOCK_STATUS of a whole export, one request after the other: for who wants to see it, not use it.

A reply may hold a megabyte of extents (QEMU sends up to 131072). The data path's parser
(replies.py) waits for no more than fits its buffer, and asks for one extent at a time; so this one
reads by itself.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from blockemu.drivers.nbd.negotiation_stream import NegotiationError, NegotiationStream
from blockemu.drivers.nbd.protocol import (
    NBD_REPLY_FLAG_DONE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
    ChunkType,
    Command,
    errno_of_error,
    request_word,
)

if TYPE_CHECKING:
    from blockemu.drivers.nbd.inspection import ExportInfo

Extent = tuple[int, int]
"""Length in bytes, and what the context says of them."""

EXTENTS_MAX: Final = 1 << 20
"""Of one reply; QEMU sends an eighth of it at most."""

CHUNKS_MAX: Final = 1024
"""Of one reply: one is what a server sends that is asked for one context."""

REQUEST_BYTES_MAX: Final = 0xFFFFFFFF
"""What one request can ask for."""

_EXTENT = struct.Struct(">II")
_ERROR = struct.Struct(">IH")
_REST = struct.Struct(">I")
_ERROR_TYPES: Final = 1 << 15


async def read_statuses(
    stream: NegotiationStream, info: ExportInfo, context: int
) -> AsyncIterator[list[Extent]]:
    """The extents of the export from its start to its end, a reply's at a time.

    Suspends: for the server. Raises: NegotiationError.
    """
    minimum = max(info.blocks[0] if info.blocks else 1, 1)
    offset, cookie = 0, 0
    while offset < info.size:
        cookie += 1
        length = min(info.size - offset, REQUEST_BYTES_MAX - REQUEST_BYTES_MAX % minimum)
        word = request_word(Command.NBD_CMD_BLOCK_STATUS)
        await stream.send(REQUEST.pack(word, cookie.to_bytes(8, "big"), offset, length))
        extents = await _reply(stream, cookie, context)
        extents, covered = _inside(extents, info.size - offset)
        offset += covered
        yield extents


def _inside(extents: list[Extent], room: int) -> tuple[list[Extent], int]:
    """What of `extents` lies in the next `room` bytes, and how many that are: the last one may
    reach past the export's end, where nothing is."""
    kept: list[Extent] = []
    left = room
    for length, state in extents:
        if not left:
            break
        kept.append((min(length, left), state))
        left -= kept[-1][0]
    return kept, room - left


async def _reply(stream: NegotiationStream, cookie: int, context: int) -> list[Extent]:
    extents: list[Extent] = []
    error: NegotiationError | None = None
    for _ in range(CHUNKS_MAX):
        flags, kind, data = await _chunk(stream, cookie)
        if kind == ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS:
            if extents or len(data) < 4 + _EXTENT.size or (len(data) - 4) % _EXTENT.size:
                raise NegotiationError(f"the server sends a block status of {len(data)} bytes")
            if int.from_bytes(data[:4], "big") != context:
                raise NegotiationError("the server sends a block status of another context")
            extents = list(_EXTENT.iter_unpack(data[4:]))
        elif kind & _ERROR_TYPES:
            error = _server_error(data)
        elif kind != ChunkType.NBD_REPLY_TYPE_NONE:
            raise NegotiationError(f"the server answers BLOCK_STATUS with a chunk of type {kind}")
        if flags & NBD_REPLY_FLAG_DONE:
            break
    if error is not None:
        raise error
    if not extents or not all(length for length, _ in extents):
        raise NegotiationError("the server sends a block status of no bytes")
    return extents


async def _chunk(stream: NegotiationStream, cookie: int) -> tuple[int, int, bytes]:
    """(flags, type, payload). A simple reply counts as a chunk: some servers refuse by one."""
    head = await stream.receive(SIMPLE_REPLY.size)
    magic, second, raw_cookie = SIMPLE_REPLY.unpack(head)
    if magic not in (NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC):
        raise NegotiationError(f"the server sends a reply with a bad magic number, {magic:#x}")
    if int.from_bytes(raw_cookie, "big") != cookie:
        raise NegotiationError("the server answers a request that it wasn't sent")
    if magic == NBD_SIMPLE_REPLY_MAGIC:
        kind = ChunkType.NBD_REPLY_TYPE_ERROR if second else ChunkType.NBD_REPLY_TYPE_NONE
        return NBD_REPLY_FLAG_DONE, kind, _ERROR.pack(second, 0)
    (length,) = _REST.unpack(await stream.receive(_REST.size))
    if length > 4 + EXTENTS_MAX * _EXTENT.size:
        raise NegotiationError(f"the server sends a chunk of {length} bytes")
    return second >> 16, second & 0xFFFF, await stream.receive(length)


def _server_error(data: bytes) -> NegotiationError:
    if len(data) < _ERROR.size:
        return NegotiationError(f"the server sends an error in {len(data)} bytes")
    error, length = _ERROR.unpack_from(data)
    text = data[_ERROR.size : _ERROR.size + length].decode(errors="replace").strip()
    said = os.strerror(errno_of_error(error))
    return NegotiationError(f"the server refuses: {said}" + (f" ('{text}')" if text else ""))
