# SPDX-License-Identifier: Apache-2.0
"""Cuts a stream of bytes into JSON values.

The protocol has no lines and no lengths: a value ends where its brackets are closed, so clients
may send one over many lines, or many in one. The cutter follows brackets and quotes only, and
leaves the grammar to the `json` module. Strings may also stand in single quotes, which people use
at a shell. Sizes and nesting are bounded, because a client controls both; past a bound, the client
is told, and everything up to the next line's end is dropped: where the value would have ended can't
be known any more, and a new line is where a client would begin again.
"""

from __future__ import annotations

import json
import re
from typing import Any

from blockemu.qmp.errors import QmpError

REQUEST_BYTES_MAX = 1 << 20
"""No command of ours needs more; a list of ten thousand dirty bitmaps would still fit."""

NESTING_MAX = 200
"""Far from Python's recursion limit, and deeper than any block graph that works."""

_SPACE = b" \t\r\n"
_OUTSIDE = re.compile(rb"[\"'{}\[\]]")
_BARE_END = re.compile(rb"[\s\"'{}\[\],:]")
_IN_STRING = {ord('"'): re.compile(rb'["\\]'), ord("'"): re.compile(rb"['\\]")}
_ANY_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', re.DOTALL)


class JsonStream:
    """The state between two reads. `feed` takes bytes, and returns the values that are complete."""

    def __init__(self, *, bytes_max: int = REQUEST_BYTES_MAX, nesting_max: int = NESTING_MAX):
        self._bytes_max = bytes_max
        self._nesting_max = nesting_max
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._quote = 0
        """The quote that is open, or 0."""
        self._skipping = False
        """Dropping everything up to the end of the line."""

    def feed(self, data: bytes) -> list[bytes | QmpError]:
        """The values that `data` completes, in order; an error stands where one was dropped."""
        self._buffer += data
        found: list[bytes | QmpError] = []
        while (value := self._next()) is not None:
            found.append(value)
        if len(self._buffer) > self._bytes_max:
            found.append(self._give_up(f"request over {self._bytes_max} bytes"))
        return found

    def _give_up(self, reason: str) -> QmpError:
        self._skipping = True
        self._skip_line()
        return QmpError(f"JSON parse error, {reason}")

    def _skip_line(self) -> None:
        end = self._buffer.find(b"\n")
        self._skipping = end < 0
        self._reset(len(self._buffer) if end < 0 else end + 1)

    def _next(self) -> bytes | QmpError | None:
        buffer = self._buffer
        if self._skipping:
            self._skip_line()
        if self._scanned == 0:
            self._skip_space()
        while self._scanned < len(buffer):
            if self._quote:
                self._scan_string()
                if self._quote == 0 and self._depth == 0:
                    return self._take(self._scanned)
                if self._quote:
                    return None
            elif self._depth == 0 and buffer[self._scanned] not in b"\"'{}[]":
                # A bare word or number: it ends before the next character that can't be in one.
                end = _BARE_END.search(buffer, self._scanned)
                if end is None:
                    return None
                return self._take(max(end.start(), self._scanned + 1))
            else:
                mark = _OUTSIDE.search(buffer, self._scanned)
                if mark is None:
                    self._scanned = len(buffer)
                    return None
                self._scanned = mark.end()
                character = buffer[mark.start()]
                if character in b"\"'":
                    self._quote = character
                    continue
                self._depth += 1 if character in b"{[" else -1
                if self._depth > self._nesting_max:
                    return self._give_up(f"nested over {self._nesting_max} deep")
                if self._depth <= 0:
                    return self._take(self._scanned)
        return None

    def _scan_string(self) -> None:
        """Move on to behind the closing quote, or as far as the bytes go."""
        pattern = _IN_STRING[self._quote]
        while mark := pattern.search(self._buffer, self._scanned):
            if self._buffer[mark.start()] == self._quote:
                self._scanned = mark.end()
                self._quote = 0
                return
            if mark.end() == len(self._buffer):
                self._scanned = mark.start()  # half of an escape
                return
            self._scanned = mark.end() + 1
        self._scanned = len(self._buffer)

    def _skip_space(self) -> None:
        spaces = len(self._buffer) - len(self._buffer.lstrip(_SPACE))
        if spaces:
            del self._buffer[:spaces]

    def _take(self, end: int) -> bytes:
        value = bytes(self._buffer[:end])
        self._reset(end)
        return value

    def _reset(self, end: int) -> None:
        del self._buffer[:end]
        self._scanned = self._depth = self._quote = 0


def parse_value(text: bytes) -> Any:
    """The value that `text` is. Raises: QmpError."""
    try:
        decoded = text.decode()
        if "'" in decoded:
            decoded = _ANY_STRING.sub(_double_quoted, decoded)
        return json.loads(decoded, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise QmpError(f"JSON parse error, {error}") from error


def _double_quoted(found: re.Match[str]) -> str:
    text = found[0]
    if text[0] == '"':
        return text
    return '"' + text[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"invalid keyword '{name}'")
