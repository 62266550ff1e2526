# SPDX-License-Identifier: Apache-2.0
"""Are these bytes all zero? Asked of whole write requests, so it has to cost little.

`bytes.startswith` takes any buffer and compares it with memcmp: no copy, and it ends where the
first byte differs. Measured on 64 KiB of zeroes, the worst case: 1.3 us, and 0.07 us on data.
Others on the same zeroes: a copy compared with bytes 5 us, `bytes.count` 67 us, two memoryviews
compared 185 us, `any` 720 us.
"""

from __future__ import annotations

from typing import Final

_ZEROES: Final = bytes(64 * 1024)
"""Compared with in pieces, so that one small constant, warm in the cache, does for every length."""

_ZERO_VIEW: Final = memoryview(_ZEROES)


def is_zero(view: memoryview) -> bool:
    """Whether there is nothing but zero bytes in `view`. Context: any thread."""
    starts_with, step = _ZEROES.startswith, len(_ZEROES)
    if len(view) <= step:
        return starts_with(view)
    return all(starts_with(view[start : start + step]) for start in range(0, len(view), step))


def fill_zeroes(view: memoryview) -> None:
    """Make all of `view` zero bytes, without as many zero bytes to copy from. Context: any
    thread."""
    step, length = len(_ZEROES), len(view)
    if length <= step:
        view[:] = _ZERO_VIEW[:length]
        return
    for start in range(0, length, step):
        part = view[start : start + step]
        part[:] = _ZERO_VIEW[: len(part)]
