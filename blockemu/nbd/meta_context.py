# SPDX-License-Identifier: Apache-2.0
"""Meta contexts: what a client may ask BLOCK_STATUS about, and how it chooses some.

    base:allocation           holes and zeroes, of the whole backing chain
    qemu:allocation-depth     which layer of the chain holds the bytes: 0 none, 1 the image itself,
                              2 its backing file, and so on; if the export offers it
    qemu:dirty-bitmap:NAME    what is dirty in a bitmap that the export offers

Source: doc/proto.md of NetworkBlockDevice/nbd, "Metadata querying", "NBD_OPT_LIST_META_CONTEXT",
"NBD_OPT_SET_META_CONTEXT"; QEMU's docs/interop/nbd.rst for the namespace `qemu`.

LIST takes wild cards (`base:`, `qemu:`, `qemu:dirty-bitmap:`), SET takes whole names only. What
isn't known is ignored by both. Each SET replaces what the last one chose, also when it fails; and
what it chose is good for that export only. Names are compared as bytes, as they came.

Context: negotiation's, the main loop.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blockemu.drivers.nbd.protocol import STRING_LENGTH_MAX

if TYPE_CHECKING:
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.exports import Export

DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
WILD_CARDS: Final = (b"base:", b"qemu:", DIRTY_BITMAP.encode())


class Kind(enum.Enum):
    """What a context speaks of; the values are full names, but for that of bitmaps."""

    ALLOCATION = "base:allocation"
    DEPTH = "qemu:allocation-depth"
    BITMAP = DIRTY_BITMAP


@dataclass(frozen=True, slots=True)
class MetaContext:
    """One context of an export. `id` is unique among those of the export, and names it in replies.

    `bitmap` is set for Kind.BITMAP alone.
    """

    id: int
    name: str
    kind: Kind
    bitmap: DirtyBitmap | None = None


@dataclass(frozen=True, slots=True)
class MetaContextQuery:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    export_name: bytes
    queries: tuple[bytes, ...]


class BadQuery(Exception):
    """The option's data isn't what the document says; the text names the reason."""


class TooManyQueries(Exception):
    """More queries than the limit; the text says so."""


def parse_query(data: bytes, *, queries_max: int) -> MetaContextQuery:
    """Take apart the data of LIST_META_CONTEXT or SET_META_CONTEXT.

    Layout: u32 length of the export's name, name, u32 n, n times (u32 length, query).
    Raises: BadQuery; TooManyQueries.
    """
    name, position = _string(data, 0, "the export's name")
    if len(data) - position < 4:
        raise BadQuery("too short for a name and a number of queries")
    (count,) = struct.unpack_from(">I", data, position)
    position += 4
    if count * 4 > len(data) - position:
        raise BadQuery("there are fewer queries than it says")
    if count > queries_max:
        raise TooManyQueries(f"more than {queries_max} queries")
    queries = []
    for _ in range(count):
        query, position = _string(data, position, "a query")
        if len(query) > STRING_LENGTH_MAX:
            raise BadQuery(f"a query is longer than {STRING_LENGTH_MAX} bytes")
        queries.append(query)
    if position != len(data):
        raise BadQuery("something follows the last query")
    return MetaContextQuery(name, tuple(queries))


def _string(data: bytes, position: int, what: str) -> tuple[bytes, int]:
    """A string behind its length of 32 bits, and the place behind it. Raises: BadQuery."""
    if len(data) - position < 4:
        raise BadQuery(f"too short for the length of {what}")
    (length,) = struct.unpack_from(">I", data, position)
    position += 4
    if length > len(data) - position:
        raise BadQuery(f"{what} is longer than the option")
    return data[position : position + length], position + length


def contexts_of(export: Export) -> list[MetaContext]:
    """All that a client may choose on this export."""
    contexts = [MetaContext(0, Kind.ALLOCATION.value, Kind.ALLOCATION)]
    if export.allocation_depth:
        contexts.append(MetaContext(1, Kind.DEPTH.value, Kind.DEPTH))
    for number, bitmap in enumerate(export.bitmaps, 2):
        name = DIRTY_BITMAP + bitmap.name
        contexts.append(MetaContext(number, name, Kind.BITMAP, bitmap))
    return contexts


def listed(export: Export, queries: tuple[bytes, ...]) -> list[MetaContext]:
    """What LIST answers: the contexts that match any of the queries; all, if there are none."""
    contexts = contexts_of(export)
    if not queries:
        return contexts
    exact = set(queries)
    prefixes = tuple(card for card in WILD_CARDS if card in exact)
    return [
        context
        for context in contexts
        if (name := _encoded(context)) in exact or name.startswith(prefixes)
    ]


class Choice:
    """What SET_META_CONTEXT has chosen last, in one negotiation."""

    __slots__ = ("_contexts", "_export")

    def __init__(self) -> None:
        self._export: Export | None = None
        self._contexts: tuple[MetaContext, ...] = ()

    def forget(self) -> None:
        """Nothing is chosen: SET failed, or is about to be answered; or TLS begins."""
        self._export, self._contexts = None, ()

    def choose(self, export: Export, queries: tuple[bytes, ...]) -> tuple[MetaContext, ...]:
        """What SET chooses: the contexts of the export that a query names in full."""
        exact = set(queries)
        self._export = export
        self._contexts = tuple(
            context for context in contexts_of(export) if _encoded(context) in exact
        )
        return self._contexts

    def on(self, export: Export) -> tuple[MetaContext, ...]:
        """What is chosen, if the client takes this export."""
        return self._contexts if export is self._export else ()


def encode_reply(context: MetaContext, *, listing: bool) -> bytes:
    """The data of NBD_REP_META_CONTEXT. Layout: u32 id (0 in a listing), name."""
    return struct.pack(">I", 0 if listing else context.id) + _encoded(context)


def _encoded(context: MetaContext) -> bytes:
    return context.name.encode("utf-8", "surrogateescape")
