# SPDX-License-Identifier: Apache-2.0
"""Zeroes that need not be read: what the tables of a chain say, without a question to any file.

A read of a format node looks at its tables anyway. Where they say that there is nothing, or that
there are zeroes, whoever passes the bytes on may say so instead of moving them. That is only worth
it where it is free, so a layer whose answer would be a system call or a wait for somebody isn't
asked (`BlockDriver.may_tell_zeroes`): what it holds counts as data, whatever it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.drivers.status_runs import ALLOCATED, ZERO

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState

LAYERS_MAX: Final = 16
"""Stretches that are looked up in a layer for one answer: bounds the work in a long chain."""

RUNS_MAX: Final = 256
"""Runs of one stretch that are looked at; what is behind them counts as data."""


async def known_zeroes(
    node: BlockDriverState, offset: int, length: int, *, worth: int
) -> list[tuple[int, int]]:
    """Where `node` is known to show zeroes: (offset, length), in order, none touching another.

    Stretches of less than `worth` bytes are left out, and the list may miss others. A write that is
    under way may or may not be in it, as in a read.

    Context: home thread of the node's context. Suspends: while tables are read. Raises: OSError.
    """
    found: list[tuple[int, int]] = []
    to_ask = [(node, offset, length)]
    for _ in range(LAYERS_MAX):
        if not to_ask:
            break
        layer, position, length = to_ask.pop()
        runs = await layer.status_runs(position, length, runs_max=RUNS_MAX)
        backing = layer.children.get("backing")
        below = None if backing is None else backing.node
        for run, state in zip(runs.lengths, runs.states, strict=True):
            if state & ZERO:
                found.append((position, run))
            elif (
                below is not None
                and run >= worth
                and not state & ALLOCATED
                and below.driver.may_tell_zeroes(position, run)
            ):
                to_ask.append((below, position, run))
            position += run
    return [piece for piece in _joined(sorted(found)) if piece[1] >= worth]


def _joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same stretches, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for offset, length in pieces:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((offset, length))
    return joined
