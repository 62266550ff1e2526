# SPDX-License-Identifier: Apache-2.0
"""Block status in bulk: what a long range is, run by run, through a whole backing chain.

`block_status` (driver.py) and `chain_status` answer for one extent and cost a call of every layer
for it. Who wants to know all of a disk, such as a client that maps 1.6 million extents, asks here:
a layer walks its tables and hands back hundreds of runs at once, and where a layer holds nothing,
the runs of its backing file are laid under it, for the whole range in one go.

A run is a length and a *state*, a small number:

    bit 0  ALLOCATED   a layer of the chain holds the bytes, or says that they are zeroes
    bit 1  DATA        they take space
    bit 2  ZERO        they read as zeroes
    from bit 3 on      the depth: 1 for the node's own layer, 2 for its backing file, and so on; 0
                       where no layer holds them. A driver, which knows its own layer only, says 0.

Where a layer is longer than its backing file, what lies behind the latter's end counts as zeroes
that the backing file holds: that is how QEMU counts the depth.

The work of one call is bounded, so that others get their turn: `runs_max`, and what a driver sets
itself. So an answer may end early, but it is never empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.driver import BlockStatus
    from blockemu.drivers.node import BlockDriverState

ALLOCATED: Final = 1
DATA: Final = 2
ZERO: Final = 4
DEPTH_SHIFT: Final = 3
BITS_MASK: Final = (1 << DEPTH_SHIFT) - 1


class StatusRuns:
    """Runs that follow one another; neighbours differ in their states."""

    __slots__ = ("_codes", "_table", "lengths")

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._codes: list[int] = []
        # What the codes stand for; None: they are the states themselves. A table costs nothing for
        # each run, and most runs are only ever looked at through `meanings`.
        self._table: list[int] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def states(self) -> list[int]:
        """The state of each run."""
        if self._table is not None:
            self._codes = list(map(self._table.__getitem__, self._codes))
            self._table = None
        return self._codes

    def translate(self, table: list[int]) -> None:
        """Each state is the one that the table has at its place: others for others."""
        self._codes, self._table = self.states, table

    def meanings(self, meaning: Callable[[int], int]) -> tuple[list[int], bool]:
        """(what each state means, whether neighbours are known to differ in that, too)."""
        codes, table = self._codes, self._table
        pair = codes[:2]
        if len(pair) == 2 and codes == (pair * (len(codes) // 2 + 1))[: len(codes)]:
            # By turns, as in most images: seeing that takes an eighth of the time of the rest.
            meant = [meaning(code if table is None else table[code]) for code in pair]
            return (meant * (len(codes) // 2 + 1))[: len(codes)], meant[0] != meant[1]
        found = {code: meaning(code if table is None else table[code]) for code in set(codes)}
        return list(map(found.__getitem__, codes)), len({*found.values()}) == len(found)

    def add(self, length: int, state: int) -> None:
        """One more run, or the last one made longer. `length` isn't 0."""
        states = self.states
        if states and states[-1] == state:
            self.lengths[-1] += length
        else:
            self.lengths.append(length)
            states.append(state)

    def extend(self, lengths: list[int], states: list[int]) -> None:
        """More runs, at least one, which are in these two states by turns."""
        mine = self.states
        if mine and mine[-1] == states[0]:
            self.lengths[-1] += lengths[0]
            lengths, states = lengths[1:], states[::-1]
        self.lengths += lengths
        mine += (states * (len(lengths) // 2 + 1))[: len(lengths)]

    @property
    def length_bytes(self) -> int:
        """How much is described."""
        return sum(self.lengths)

    def cut(self, length: int) -> None:
        """Leave out what is behind the first `length` bytes."""
        excess = self.length_bytes - length
        while excess > 0 and self.lengths[-1] <= excess:
            excess -= self.lengths.pop()
            self._codes.pop()
        if excess > 0:
            self.lengths[-1] -= excess


def state_of(status: BlockStatus) -> int:
    """The state of an extent in its own layer."""
    return (
        (ALLOCATED if status.allocated else 0)
        | (DATA if status.data else 0)
        | (ZERO if status.zero else 0)
    )


_THROUGH: Final = -1
"""While a chain is put together: the layers so far show what is below."""


async def chain_runs(
    node: BlockDriverState, offset: int, length: int, *, runs_max: int
) -> StatusRuns:
    """The runs from `offset` on as `node` shows them: at most `length` bytes of them.

    Context: home thread of the node's context. Suspends: while metadata is read; the node counts as
    busy meanwhile, so a drained section waits. Raises: OSError.
    """
    with node.busy():
        runs = await _layer_runs(node, offset, length, runs_max=runs_max, depth=1)
        depth = 1
        while "backing" in node.children and (gap := _gap(runs)) is not None:
            node, depth = node.children["backing"].node, depth + 1
            start, end = gap
            below = await _layer_runs(
                node, offset + start, end - start, runs_max=runs_max, depth=depth
            )
            runs = _laid_under(runs, below, start)
        return runs


async def _layer_runs(
    node: BlockDriverState, offset: int, length: int, *, runs_max: int, depth: int
) -> StatusRuns:
    """One layer's answer, with states as they are in a chain of which it is the `depth`th."""
    has_backing = "backing" in node.children
    runs = await node.status_runs(offset, length, runs_max=runs_max)
    states = [state | depth << DEPTH_SHIFT for state in range(1 << DEPTH_SHIFT)]
    if has_backing:
        states[0] = states[DATA] = _THROUGH
        states[ZERO] = ZERO | ALLOCATED | (depth + 1) << DEPTH_SHIFT
    else:
        for state in (0, DATA, ZERO, DATA | ZERO):
            states[state] = state
    runs.translate(states)
    return runs


def _gap(runs: StatusRuns) -> tuple[int, int] | None:
    """From where to where, from the start of the runs, something shows through; None: nowhere."""
    if _THROUGH not in runs.states:
        return None
    first = runs.states.index(_THROUGH)
    behind = runs.states[::-1].index(_THROUGH)
    end = runs.length_bytes - sum(runs.lengths[len(runs) - behind :])
    return sum(runs.lengths[:first]), end


def _laid_under(upper: StatusRuns, lower: StatusRuns, start: int) -> StatusRuns:
    """`upper` with what shows through filled from `lower`, which begins `start` bytes behind it and
    may end early: then so does the result."""
    merged = StatusRuns()
    position, index, lower_end = 0, 0, start
    for length, state in zip(upper.lengths, upper.states, strict=True):
        end = position + length
        if state != _THROUGH:
            merged.add(length, state)
            position = end
        while position < end:
            while lower_end <= position:
                if index == len(lower):
                    return merged
                lower_end += lower.lengths[index]
                index += 1
            stop = min(end, lower_end)
            merged.add(stop - position, lower.states[index - 1])
            position = stop
    return merged
