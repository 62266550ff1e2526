# SPDX-License-Identifier: Apache-2.0
"""Sizes, shown as qemu-img does."""

from __future__ import annotations

import pytest

from blockemu.img.size import format_size


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (200704, "196 KiB"),
        (67108864, "64 MiB"),
        (5_000_000_000, "4.66 GiB"),
        (1 << 40, "1 TiB"),
        (2**63 - 1, "8 EiB"),
    ],
)
def test_format_size_shows(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
