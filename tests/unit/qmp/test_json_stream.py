# SPDX-License-Identifier: Apache-2.0
"""Cutting a byte stream into JSON values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blockemu.qmp.errors import QmpError
from blockemu.qmp.json_stream import JsonStream, parse_value


def values(stream: JsonStream, data: bytes) -> list[Any]:
    return [v if isinstance(v, QmpError) else parse_value(v) for v in stream.feed(data)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a":1}\n', [{"a": 1}]),
        (b'{"a":1}{"b":2}', [{"a": 1}, {"b": 2}]),
        (b'{\n "a":\n 1\n}\n', [{"a": 1}]),
        (b' \r\n\t[1] 3 true "x" ', [[1], 3, True, "x"]),
        (b'{"a":"}]{"}', [{"a": "}]{"}]),
        (b'{"a":"\\"}\\\\"}', [{"a": '"}\\'}]),
        (b"{'a':'say \"hi\"', 'b':'it\\'s'}", [{"a": 'say "hi"', "b": "it's"}]),
        (b'{"a":"it\'s"}', [{"a": "it's"}]),
        (b'{"a":', []),
        (b"12", []),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_feed_cuts_values_however_they_arrive(data: bytes, expected: list[Any], chunk: int) -> None:
    stream = JsonStream()
    found: list[Any] = []
    for start in range(0, len(data), chunk):
        found += values(stream, data[start : start + chunk])
    assert found == expected


@pytest.mark.parametrize(
    "data", [b"}\n", b"]", b"nonsense ", b"{x}", b'{"a":1,"a":2}', b"NaN ", b'"\xff"', b'{"a" 1}']
)
def test_bad_value_is_an_error_and_the_next_is_read(data: bytes) -> None:
    stream = JsonStream()
    (bad,) = stream.feed(data)
    assert isinstance(bad, bytes)
    with pytest.raises(QmpError, match="JSON parse error"):
        parse_value(bad)
    assert values(stream, b"[7]") == [[7]]


def test_request_over_the_bound_is_dropped_with_an_error() -> None:
    stream = JsonStream(bytes_max=100)
    assert values(stream, b'["' + b"x" * 60) == []
    (error,) = stream.feed(b"x" * 60)
    assert isinstance(error, QmpError)
    assert "100 bytes" in error.desc
    assert values(stream, b'xx"] [6]') == []
    assert values(stream, b"xx\n[7]") == [[7]]


def test_many_requests_in_one_read_may_exceed_the_bound_of_one() -> None:
    assert values(JsonStream(bytes_max=100), b"[1]" * 100) == [[1]] * 100


def test_nesting_over_the_bound_is_dropped_with_an_error() -> None:
    stream = JsonStream(nesting_max=10)
    assert values(stream, b"[" * 10 + b"]" * 10)[0] == json.loads("[" * 10 + "]" * 10)
    error, *rest = stream.feed(b"[" * 12 + b"\n[7]")
    assert isinstance(error, QmpError)
    assert rest == [b"[7]"]
