# SPDX-License-Identifier: Apache-2.0
"""The sector: what qemu-img counts a disk in.

A raw image may end anywhere; to guests and tools it then ends with its last sector, whose missing
bytes are zeroes.
"""

from __future__ import annotations

from typing import Final

SECTOR_BYTES: Final = 512


def sectors_up(length_bytes: int) -> int:
    """`length_bytes` rounded up to whole sectors."""
    return -(-length_bytes // SECTOR_BYTES) * SECTOR_BYTES
