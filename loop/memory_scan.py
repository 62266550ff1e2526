# SPDX-License-Identifier: Apache-2.0
"""What a buffer holds: where it is zero bytes, and how far two of them are the same.

In C without the GIL (native/memory_scan.c): a copy to compare with, or a loop in Python, would take
longer than reading the data did.

Context: any thread; the views must not change meanwhile. Suspends: never.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from blockemu.loop._libaio import ffi, lib


class Run(NamedTuple):
    """Bytes of a view that are alike."""

    start: int
    length: int
    is_zero: bool


def zero_and_data_runs(view: memoryview, *, offset: int, granule: int) -> Iterator[Run]:
    """The view's blocks of `granule` bytes, neighbours that are alike together, in order.

    `offset` is where the view begins in what the blocks are counted in: the first block may be a
    part of one, and so may the last. A block is zero when all of its bytes are.
    """
    assert granule > 0
    start = 0
    while start < len(view):
        head = -(offset + start) % granule
        rest = view[start:]
        found = lib.memory_run(ffi.from_buffer(rest), len(rest), head, granule)
        length = abs(found)
        yield Run(start, length, found < 0)
        start += length


def equal_length(one: memoryview, other: memoryview) -> int:
    """How many leading bytes two views of equal length have in common."""
    assert len(one) == len(other)
    if not one:
        return 0
    length = lib.memory_equal_length(ffi.from_buffer(one), ffi.from_buffer(other), len(one))
    return int(length)


def is_zero(view: memoryview) -> bool:
    """Whether the view holds nothing but zero bytes; an empty one does."""
    return not view or lib.memory_run(ffi.from_buffer(view), len(view), 0, len(view)) < 0
