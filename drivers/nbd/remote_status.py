# SPDX-License-Identifier: Apache-2.0
"""Block status of an export: what its server says, as runs (status_runs.py).

A server answers a request for many extents with as many as it likes, and a client can only say for
how much of the disk it asks. Asked for all of a disk in a million pieces it would count a hundred
thousand extents for each answer, most of which nobody has room for. So the span that is asked for
follows what came back: halved when there was much more than wanted, doubled when there was less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.drivers.nbd.address import U32_MAX
from blockemu.drivers.nbd.protocol import AllocationState, Command, CommandFlag
from blockemu.drivers.status_runs import ALLOCATED, DATA, ZERO, StatusRuns

if TYPE_CHECKING:
    from blockemu.drivers.nbd.link import NbdLink

EXTENDED_BYTES_MAX: Final = 1 << 62
"""Of one TRIM, WRITE_ZEROES or BLOCK_STATUS where headers have 64 bits: no bound in practice."""

FIRST_SPAN_BYTES: Final = 1 << 30
SPAN_BYTES_MIN: Final = 1 << 20
EXTENTS_MIN, EXTENTS_GOOD_MAX = 1024, 8192
"""In an answer, without a change of the span."""

_HOLE = int(AllocationState.NBD_STATE_HOLE)
_ZERO = int(AllocationState.NBD_STATE_ZERO)
_STATES: Final = [
    # Neither data nor zeroes: nobody knows what it reads as, and nothing is allocated for it.
    (0 if state & _HOLE else DATA | ALLOCATED) | (ZERO | ALLOCATED if state & _ZERO else 0)
    for state in range(4)
]
"""By the bits of base:allocation. What other contexts say is taken for these bits, as QEMU does."""


class RemoteStatus:
    """Context: home thread of the link."""

    def __init__(self, link: NbdLink) -> None:
        self._link = link
        self._span_bytes = FIRST_SPAN_BYTES

    async def ask(self, offset: int, length: int, *, only_one: bool) -> StatusRuns:
        """At least one run from `offset` on, at most `length` bytes of them.

        Suspends: for the server. Raises: OSError.
        """
        facts = self._link.facts
        runs = StatusRuns()
        if offset >= facts.length:
            runs.add(length, ZERO | ALLOCATED)
            return runs
        length = min(length, facts.length - offset)
        if facts.context is None:
            runs.add(length, DATA | ALLOCATED)
            return runs
        mask = facts.block_min - 1
        start = offset & ~mask
        bytes_max = EXTENDED_BYTES_MAX if facts.extended else U32_MAX & ~mask
        if not only_one:
            bytes_max = min(bytes_max, self._span_bytes)
        end = min((offset + length + mask) & ~mask, start + bytes_max)
        flags = int(CommandFlag.NBD_CMD_FLAG_REQ_ONE) if only_one else 0
        answer = await self._link.request(Command.NBD_CMD_BLOCK_STATUS, flags, start, end - start)
        if not only_one:
            self._follow(len(answer.extents), end - start)
        _add_extents(runs, answer.extents, offset - start, length, mask)
        if not runs:  # the server thinks in smaller steps than it lets us: part of it is data
            runs.add(min(length, facts.block_min - (offset - start)), DATA | ALLOCATED)
        return runs

    def _follow(self, extents: int, asked_bytes: int) -> None:
        if extents > EXTENTS_GOOD_MAX:
            self._span_bytes = max(self._span_bytes // 2, SPAN_BYTES_MIN)
        elif extents < EXTENTS_MIN and asked_bytes >= self._span_bytes:
            self._span_bytes = min(self._span_bytes * 2, EXTENDED_BYTES_MAX)


def _add_extents(
    runs: StatusRuns, extents: list[tuple[int, int]], skip: int, length: int, mask: int
) -> None:
    """What lies between `skip` bytes into the extents and `length` further on. It ends before an
    extent that doesn't end where a block does."""
    position, end = 0, skip + length
    for extent_bytes, state in extents:
        whole = extent_bytes & ~mask
        start, position = max(position, skip), min(position + whole, end)
        if position > start:
            runs.add(position - start, _STATES[state & 3])
        if position >= end or whole != extent_bytes:
            return
