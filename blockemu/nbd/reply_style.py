# SPDX-License-Identifier: Apache-2.0
"""The three styles of messages in the transmission phase, and all that is written in them.

A client gets the style that it asks for in negotiation: *simple* by default, *structured* after
NBD_OPT_STRUCTURED_REPLY, *extended* after NBD_OPT_EXTENDED_HEADERS. A style knows how long the
header of a request is, and makes every reply: there is no other place that packs one. (C makes the
heads of plain replies itself, native/replies.c; a test compares the two.)

A reply of chunks is one chunk wherever that is allowed: the data of a READ with DONE set, which
costs as much as a simple reply. Successes that carry no data stay simple replies in the structured
style, the shorter of the two that the document allows; errors are chunks, for their text.

Source: doc/proto.md of NetworkBlockDevice/nbd, "Structured reply types"; for extended headers, the
branch extension-ext-header. Layouts: drivers/nbd/protocol.py.

Every method takes the cookie and the offset of the request, because an extended chunk repeats them.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from typing import Final

from blockemu.drivers.nbd.protocol import (
    EXTENDED_REQUEST,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_REPLY_FLAG_DONE,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_OK,
    STRING_LENGTH_MAX,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
    request_word,
)

_NONE: Final = ChunkType.NBD_REPLY_TYPE_NONE
_DATA: Final = ChunkType.NBD_REPLY_TYPE_OFFSET_DATA
_HOLE: Final = ChunkType.NBD_REPLY_TYPE_OFFSET_HOLE
_ERROR: Final = ChunkType.NBD_REPLY_TYPE_ERROR
_ERROR_OFFSET: Final = ChunkType.NBD_REPLY_TYPE_ERROR_OFFSET
_STATUS: Final = ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS
_STATUS_EXT: Final = ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS_EXT

_HOLE_PAYLOAD: Final = struct.Struct(">QI")
_CONTEXT: Final = struct.Struct(">I")
_CONTEXT_EXTENDED: Final = struct.Struct(">II")
_ERROR_PAYLOAD: Final = struct.Struct(">IH")
_OFFSET: Final = struct.Struct(">Q")

# The first eight bytes of a chunk as one number, which is quicker to pack than its three fields.
_STRUCTURED_HEAD: Final = struct.Struct(">Q8sI")
_STRUCTURED_DATA: Final = struct.Struct(">Q8sIQ")
_EXTENDED_HEAD: Final = struct.Struct(">Q8sQQ")
_EXTENDED_DATA: Final = struct.Struct(">Q8sQQQ")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request is answered with an error.

    `text` names the reason to a person; `at`, where it is known, is the first byte that is
    concerned, inside the request. A simple reply carries neither.
    """

    error: NbdError
    text: str = ""
    at: int | None = None

    def __post_init__(self) -> None:
        assert self.error, "a failure that is a success"


def _chunk_word(magic: int, kind: int, *, done: bool) -> int:
    return magic << 32 | (NBD_REPLY_FLAG_DONE if done else 0) << 16 | kind


class ReplyStyle:
    """The simple style, and what all have in common. Immutable: one instance serves everybody."""

    name = "simple"
    structured = False
    """Replies may consist of chunks: what DF, block status and sparse reads need."""
    extended = False
    """Requests have headers of 32 bytes, and all replies are extended chunks."""
    header = REQUEST
    """Of a request: word, cookie, offset, length."""
    magic = NBD_REQUEST_MAGIC
    plain_read = request_word(Command.NBD_CMD_READ)
    """The word of a READ without flags."""
    plain_write = request_word(Command.NBD_CMD_WRITE)
    """The word of a WRITE without flags, but for the one that extended headers ask of it."""

    def __repr__(self) -> str:
        return f"<{self.name} replies>"

    def read_head(self, cookie: bytes, offset: int, length: int) -> bytes:
        """What stands before the data of a READ that is answered as a whole."""
        return SIMPLE_REPLY_OK + cookie

    def success(self, cookie: bytes, offset: int) -> bytes:
        """The reply to a request that went well and has no data."""
        return SIMPLE_REPLY_OK + cookie

    def nothing_read(self, cookie: bytes, offset: int) -> bytes:
        """The reply to a READ of no bytes, which went well."""
        return self.success(cookie, offset)

    def failure(self, cookie: bytes, offset: int, failure: Failure) -> bytes:
        """The reply, or the last part of one, to a request that went wrong."""
        return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, failure.error, cookie)


class StructuredStyle(ReplyStyle):
    """Chunks with a length of 32 bits."""

    name = "structured"
    structured = True

    def read_head(self, cookie: bytes, offset: int, length: int) -> bytes:
        return _STRUCTURED_DATA.pack(_STRUCTURED_DATA_DONE, cookie, length + 8, offset)

    def nothing_read(self, cookie: bytes, offset: int) -> bytes:
        return self.none(cookie, offset)

    def failure(self, cookie: bytes, offset: int, failure: Failure) -> bytes:
        text = _clipped(failure.text)
        payload = _ERROR_PAYLOAD.pack(failure.error, len(text)) + text
        if failure.at is None:
            return self._chunk(_ERROR, cookie, offset, payload, done=True)
        payload += _OFFSET.pack(failure.at)
        return self._chunk(_ERROR_OFFSET, cookie, offset, payload, done=True)

    def data_head(
        self, cookie: bytes, offset: int, *, at: int, length: int, done: bool = False
    ) -> bytes:
        """What stands before `length` bytes of a READ's data from byte `at` of the export on."""
        assert length > 0
        return self._head(_DATA, cookie, offset, 8 + length, done=done) + _OFFSET.pack(at)

    def hole(
        self, cookie: bytes, offset: int, *, at: int, length: int, done: bool = False
    ) -> bytes:
        """`length` zeroes of a READ from byte `at` of the export on."""
        assert length > 0
        return self._chunk(_HOLE, cookie, offset, _HOLE_PAYLOAD.pack(at, length), done=done)

    def none(self, cookie: bytes, offset: int) -> bytes:
        """The end of a reply whose chunks have left."""
        return self._head(_NONE, cookie, offset, 0, done=True)

    def status(
        self,
        cookie: bytes,
        offset: int,
        *,
        context: int,
        lengths: list[int],
        states: list[int],
        done: bool = False,
    ) -> bytes:
        """What meta context `context` says of the bytes from `offset` on: how long each extent is,
        and in which state. No length takes more bits than that of a request has."""
        payload = _CONTEXT.pack(context) + _interleaved("I", lengths, states)
        return self._chunk(_STATUS, cookie, offset, payload, done=done)

    def _chunk(
        self, kind: ChunkType, cookie: bytes, offset: int, payload: bytes, *, done: bool
    ) -> bytes:
        return self._head(kind, cookie, offset, len(payload), done=done) + payload

    def _head(
        self, kind: ChunkType, cookie: bytes, offset: int, payload_bytes: int, *, done: bool
    ) -> bytes:
        word = _chunk_word(NBD_STRUCTURED_REPLY_MAGIC, kind, done=done)
        return _STRUCTURED_HEAD.pack(word, cookie, payload_bytes)


class ExtendedStyle(StructuredStyle):
    """Headers of 32 bytes both ways, with lengths of 64 bits."""

    name = "extended"
    extended = True
    header = EXTENDED_REQUEST
    magic = NBD_EXTENDED_REQUEST_MAGIC
    plain_read = request_word(Command.NBD_CMD_READ, 0, NBD_EXTENDED_REQUEST_MAGIC)
    plain_write = request_word(
        Command.NBD_CMD_WRITE, CommandFlag.NBD_CMD_FLAG_PAYLOAD_LEN, NBD_EXTENDED_REQUEST_MAGIC
    )

    def read_head(self, cookie: bytes, offset: int, length: int) -> bytes:
        return _EXTENDED_DATA.pack(_EXTENDED_DATA_DONE, cookie, offset, length + 8, offset)

    def success(self, cookie: bytes, offset: int) -> bytes:
        return _EXTENDED_HEAD.pack(_EXTENDED_NONE_DONE, cookie, offset, 0)

    def status(
        self,
        cookie: bytes,
        offset: int,
        *,
        context: int,
        lengths: list[int],
        states: list[int],
        done: bool = False,
    ) -> bytes:
        head = _CONTEXT_EXTENDED.pack(context, len(lengths))
        payload = head + _interleaved("Q", lengths, states)
        return self._chunk(_STATUS_EXT, cookie, offset, payload, done=done)

    def _head(
        self, kind: ChunkType, cookie: bytes, offset: int, payload_bytes: int, *, done: bool
    ) -> bytes:
        word = _chunk_word(NBD_EXTENDED_REPLY_MAGIC, kind, done=done)
        return _EXTENDED_HEAD.pack(word, cookie, offset, payload_bytes)


_STRUCTURED_DATA_DONE: Final = _chunk_word(NBD_STRUCTURED_REPLY_MAGIC, _DATA, done=True)
_EXTENDED_DATA_DONE: Final = _chunk_word(NBD_EXTENDED_REPLY_MAGIC, _DATA, done=True)
_EXTENDED_NONE_DONE: Final = _chunk_word(NBD_EXTENDED_REPLY_MAGIC, _NONE, done=True)


def _interleaved(typecode: str, lengths: list[int], states: list[int]) -> bytes:
    """A length and a state for each extent, big-endian. There may be a hundred thousand of them."""
    assert len(lengths) == len(states) > 0
    numbers = array(typecode, [0]) * (2 * len(lengths))
    numbers[::2] = array(typecode, lengths)
    numbers[1::2] = array(typecode, states)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _clipped(text: str) -> bytes:
    """`text` as the document lets strings be: UTF-8 of a bounded length, without NUL."""
    data = text.replace("\0", "\\0").encode(errors="replace")[:STRING_LENGTH_MAX]
    return data.decode(errors="ignore").encode()


SIMPLE: Final = ReplyStyle()
STRUCTURED: Final = StructuredStyle()
EXTENDED: Final = ExtendedStyle()
STYLES: Final = (SIMPLE, STRUCTURED, EXTENDED)
