# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write and read them, by qemu-img's rules.

Written: digits, then one of B K M G T P E (powers of 1024, either case) or nothing for bytes. A
fraction goes with a suffix other than B (`1.5G`), and what is less than a byte is cut off.
Hexadecimal (0x...) goes without a suffix. Read: three significant digits and a binary unit, which
changes at 1000 of the smaller one.
"""

from __future__ import annotations

import math
import re

SIZE_MAX = 2**63 - 1
"""Offsets are signed 64-bit numbers all the way down to the kernel."""

SUFFIXES = "BKMGTPE"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_DECIMAL = re.compile(r"\s*(\d+)(?:\.(\d*))?([BKMGTPE]?)", re.IGNORECASE | re.ASCII)
_HEXADECIMAL = re.compile(r"\s*0x([0-9a-f]+)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """The number of bytes that `text` says. Raises: ValueError, with a sentence."""
    if found := _HEXADECIMAL.fullmatch(text):
        size_bytes = int(found[1], 16)
    elif found := _DECIMAL.fullmatch(text):
        scale = 1024 ** SUFFIXES.index((found[3] or "B").upper())
        fraction = found[2] or ""
        if scale == 1 and fraction.strip("0"):
            raise ValueError(f"'{text}' is not a size: there is no fraction of a byte")
        size_bytes = int(found[1]) * scale
        if fraction:
            size_bytes += int(fraction) * scale // 10 ** len(fraction)
    else:
        raise ValueError(
            f"'{text}' is not a size: a number, and one of the suffixes k, M, G, T, P and E "
            "for kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes"
        )
    if size_bytes > SIZE_MAX:
        raise ValueError(f"'{text}' is too large: a size is between 0 and {SIZE_MAX}")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """`size_bytes` for people: 64 MiB, 4.66 GiB."""
    exponent = math.frexp(size_bytes / (1000 / 1024))[1]
    power = max(exponent - 1, 0) // 10
    return f"{size_bytes / 1024**power:.3g} {_UNITS[power]}"
