# SPDX-License-Identifier: Apache-2.0
"""Sizes, read and shown as qemu-img does."""

from __future__ import annotations

import pytest

from blockemu.img.size import SIZE_MAX, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("5b", 5),
        ("1k", 1024),
        ("1K", 1024),
        ("1.3k", 1331),
        ("1.5M", 3 << 19),
        ("64M", 64 << 20),
        ("10G", 10 << 30),
        ("1.0", 1),
        ("1T", 1 << 40),
        ("2P", 2 << 50),
        ("7E", 7 << 60),
        (" 1M", 1 << 20),
        ("0x100", 256),
        (str(SIZE_MAX), SIZE_MAX),
    ],
)
def test_parse_size_reads(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "1e3", "1.7", "1Mx", "M", "1..2", "0x10k", "8E", "12x", "1 M", "٣"],
)
def test_parse_size_refuses_with_the_text_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}'" if text.isprintable() else "size"):
        parse_size(text)


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
        (SIZE_MAX, "8 EiB"),
    ],
)
def test_format_size_shows(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
