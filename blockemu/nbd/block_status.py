# SPDX-License-Identifier: Apache-2.0
"""BLOCK_STATUS: what the client's meta contexts say of a range, as one chunk for each.

Source: doc/proto.md of NetworkBlockDevice/nbd, "NBD_CMD_BLOCK_STATUS", "base:allocation metadata
context"; the payload form is that of the branch extension-ext-header.

A request may be for 4 GiB, or with extended headers for all of the disk, and a disk may have a
million extents. So an answer is made in turns: the graph hands over some hundred runs at once
(status_runs.py), these are merged into extents, and everybody else on the thread has a go. It ends
early when the chunks have reached their share of `status_reply_bytes_max`, or after
`status_turns_max`. The document lets a server say less than it was asked; every answer has an
extent that isn't empty, so the client gets on. None reaches past what was asked for.

When metadata can't be read, what is known up to there is the answer; with nothing known, the
request fails, so the client hears of it at the place where it is.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from operator import eq
from typing import TYPE_CHECKING, Final

from blockemu.drivers.nbd.protocol import AllocationState
from blockemu.drivers.status_runs import BITS_MASK, DATA, DEPTH_SHIFT, ZERO, StatusRuns
from blockemu.loop.sync import yield_now
from blockemu.nbd.commands import REQ_ONE
from blockemu.nbd.meta_context import Kind, MetaContext
from blockemu.nbd.reply_style import StructuredStyle

if TYPE_CHECKING:
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.exports import Export
    from blockemu.limits import Limits
    from blockemu.loop.sync import Mutex
    from blockemu.nbd.request import Request

RUNS_PER_TURN: Final = 1024
"""Runs that are asked for and merged at once: some tenths of a millisecond."""

_ALLOCATION: Final = [
    int(
        (AllocationState(0) if state & DATA else AllocationState.NBD_STATE_HOLE)
        | (AllocationState.NBD_STATE_ZERO if state & ZERO else AllocationState(0))
    )
    for state in range(BITS_MASK + 1)
]
"""What base:allocation says, by the bits of a state."""

_SELECTION: Final = struct.Struct(">Q")
"""The payload of a request that chooses contexts: the length; then u32 ids."""


class Extents:
    """What one context says of consecutive extents, neighbours that are alike being one."""

    __slots__ = ("_extents_max", "_meaning", "context", "is_full", "lengths", "states")

    def __init__(self, context: MetaContext, extents_max: int) -> None:
        self.context = context
        self._extents_max = extents_max
        self._meaning = _MEANINGS[context.kind]
        self.lengths: list[int] = []
        self.states: list[int] = []
        self.is_full = False
        """There was no room for more; what follows isn't to be added."""

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, runs: StatusRuns) -> None:
        """What follows, as far as there is room."""
        if self.is_full:
            return
        lengths, states = self.lengths, self.states
        more, more_states = runs.lengths, self._meaning(runs.states)
        room = self._extents_max - len(lengths)
        last = states[-1] if states else -1
        if len(more_states) <= room and not any(map(eq, more_states, more_states[1:])):
            # The usual case of a disk in many pieces: only the seam may need mending.
            if last == more_states[0]:
                lengths[-1] += more[0]
                more, more_states = more[1:], more_states[1:]
            lengths += more
            states += more_states
            return
        for length, state in zip(more, more_states, strict=True):
            if state == last:
                lengths[-1] += length
            elif room:
                room -= 1
                lengths.append(length)
                states.append(state)
                last = state
            else:
                self.is_full = True
                return


def _allocation(states: list[int]) -> list[int]:
    return [_ALLOCATION[state & BITS_MASK] for state in states]


def _depth(states: list[int]) -> list[int]:
    return [state >> DEPTH_SHIFT for state in states]


def _as_is(states: list[int]) -> list[int]:
    return states


_MEANINGS: Final[dict[Kind, Callable[[list[int]], list[int]]]] = {
    Kind.ALLOCATION: _allocation,
    Kind.DEPTH: _depth,
    Kind.BITMAP: _as_is,
}


async def answer(request: Request) -> list[bytes | memoryview]:
    """The whole reply to a BLOCK_STATUS request that commands.check found nothing wrong with.

    Suspends: often. Raises: OSError.
    """
    connection = request.connection
    session, style = connection.session, connection.style
    assert isinstance(style, StructuredStyle)
    offset, length, contexts = request.offset, request.length, session.contexts
    if request.payload:
        size = session.export.backend.length_bytes
        length, contexts = parse_selection(request.payload, contexts)
        if not length or offset + length > size:
            text = f"BLOCK_STATUS of {length} bytes at {offset} of an export of {size}"
            raise OSError(errno.EINVAL, text)
    found = await block_status(
        session.export,
        contexts,
        connection.limits,
        offset=offset,
        length=length,
        only_one=bool(request.flags & REQ_ONE),
        extended=style.extended,
    )
    return [
        style.status(
            request.cookie,
            offset,
            context=extents.context.id,
            lengths=extents.lengths,
            states=extents.states,
            done=extents is found[-1],
        )
        for extents in found
    ]


async def block_status(
    export: Export,
    contexts: tuple[MetaContext, ...],
    limits: Limits,
    *,
    offset: int,
    length: int,
    only_one: bool,
    extended: bool,
) -> list[Extents]:
    """What `contexts` say of the bytes from `offset` on; at least one extent each.

    `only_one`: NBD_CMD_FLAG_REQ_ONE. Context: home thread of the export's context. Suspends: often.
    Raises: OSError.
    """
    extent_bytes = 16 if extended else 8
    extents_max = 1
    if not only_one:
        extents_max = max(1, limits.status_reply_bytes_max // extent_bytes // len(contexts))
    found = [Extents(context, extents_max) for context in contexts]
    # One of the runs is for seeing that the extent before it has ended.
    runs_max = min(RUNS_PER_TURN, extents_max + 1)
    collector = _Collector(export.status_turn, offset, length, limits.status_turns_max)

    async def ask_graph(position: int, length: int) -> StatusRuns:
        return await export.backend.status_runs(position, length, runs_max=runs_max)

    in_graph = [extents for extents in found if extents.context.bitmap is None]
    if in_graph:
        await collector.collect(ask_graph, in_graph)
    for extents in found:
        if extents.context.bitmap is not None:
            ask = _asker(extents.context.bitmap, runs_max)
            await collector.collect(ask, [extents])
    return found


Ask = Callable[[int, int], Awaitable[StatusRuns]]


def _asker(bitmap: DirtyBitmap, runs_max: int) -> Ask:
    async def ask(position: int, length: int) -> StatusRuns:
        return bitmap.runs(position, length, runs_max=runs_max)

    return ask


@dataclass(frozen=True, slots=True)
class _Collector:
    """Of one request. `turn` is shared with the others on the export, so that all together take one
    turn in each round of the loop."""

    turn: Mutex
    offset: int
    length: int
    turns_max: int

    async def collect(self, ask: Ask, found: list[Extents]) -> None:
        """Ask until the range is described, all of `found` are full, or it has taken long enough.

        Raises: OSError, where nothing is known.
        """
        position, end = self.offset, self.offset + self.length
        for _ in range(self.turns_max):
            async with self.turn:
                try:
                    runs = await ask(position, end - position)
                except OSError:
                    if position > self.offset:
                        return
                    raise
                for extents in found:
                    extents.add(runs)
                position += runs.length_bytes
                await yield_now()
            if position >= end or all(extents.is_full for extents in found):
                return


def parse_selection(
    payload: bytes, contexts: tuple[MetaContext, ...]
) -> tuple[int, tuple[MetaContext, ...]]:
    """(effect length, the contexts that the client wants to hear of in this reply).

    Layout: u64 length, n times u32 id. Raises: OSError(EINVAL).
    """
    if len(payload) <= _SELECTION.size or len(payload) % 4:
        text = f"a payload of {len(payload)} bytes isn't a length and some contexts"
        raise OSError(errno.EINVAL, text)
    (length,) = _SELECTION.unpack_from(payload)
    ids = struct.unpack_from(f">{(len(payload) - _SELECTION.size) // 4}I", payload, 8)
    known = {context.id: context for context in contexts}
    if len(set(ids)) != len(ids):
        raise OSError(errno.EINVAL, "the payload names a context twice")
    unknown = next((number for number in ids if number not in known), None)
    if unknown is not None:
        raise OSError(errno.EINVAL, f"context {unknown} wasn't chosen in negotiation")
    return length, tuple(known[number] for number in ids)
