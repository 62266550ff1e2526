# SPDX-License-Identifier: Apache-2.0
"""Sizes as people read them, by qemu-img's rules: three significant digits and a binary unit, which
changes at 1000 of the smaller one. (What they write is read by `parse_size` in drivers/options.py.)
"""

from __future__ import annotations

import math

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def format_size(size_bytes: int) -> str:
    """`size_bytes` for people: 64 MiB, 4.66 GiB."""
    exponent = math.frexp(size_bytes / (1000 / 1024))[1]
    power = max(exponent - 1, 0) // 10
    return f"{size_bytes / 1024**power:.3g} {_UNITS[power]}"
