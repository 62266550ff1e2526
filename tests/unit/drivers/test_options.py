# SPDX-License-Identifier: Apache-2.0
"""Typed values out of option trees."""

from __future__ import annotations

from typing import Any

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import (
    SIZE_MAX,
    parse_size,
    refuse_unknown,
    take_bool,
    take_choice,
    take_dict,
    take_size,
    take_str,
)


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


def test_take_removes_what_it_takes() -> None:
    options: dict[str, Any] = {"size": "1M", "name": "x", "flag": "on", "mode": "a"}
    assert take_size("n", options, "size") == 1 << 20
    assert take_str("n", options, "name") == "x"
    assert take_bool("n", options, "flag", default=False) is True
    assert take_choice("n", options, "mode", ("a", "b"), "b") == "a"
    assert options == {}


@pytest.mark.parametrize("value", [-1, "x", True, 1.5, [], None])
def test_take_size_of_something_else_names_node_and_option(value: object) -> None:
    with pytest.raises(ImageError, match=r"^disk0: option 'size'"):
        take_size("disk0", {"size": value}, "size")


def test_missing_option_without_default_is_refused() -> None:
    with pytest.raises(ImageError, match="option 'filename' is missing"):
        take_str("disk0", {}, "filename")


def test_take_dict_merges_flat_keys() -> None:
    options: dict[str, Any] = {"cache": {"direct": True}, "cache.no-flush": "on", "other": 1}
    assert take_dict("n", options, "cache") == {"direct": True, "no-flush": "on"}
    assert options == {"other": 1}


def test_leftover_options_are_refused_by_name() -> None:
    with pytest.raises(ImageError, match="driver 'raw' has no option 'sise'"):
        refuse_unknown("disk0", {"sise": 1}, "raw")
