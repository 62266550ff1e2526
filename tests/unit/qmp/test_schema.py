# SPDX-License-Identifier: Apache-2.0
"""Arguments checked against a dataclass."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import pytest

from blockemu.qmp.errors import QmpError
from blockemu.qmp.schema import NoArguments, parse_arguments


class Mode(enum.Enum):
    SAFE = "safe"
    HARD = "hard"


@dataclass(frozen=True)
class Address:
    host: str
    port: int = 10809


@dataclass(frozen=True)
class Arguments:
    node_name: str
    mode: Mode = Mode.SAFE
    speed: int | None = None
    ratio: float = 1.0
    read_only: bool = False
    detect_zeroes: str = field(default="off", metadata={"key": "detect_zeroes"})
    bitmaps: list[str] = field(default_factory=list)
    address: Address | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def test_all_members_arrive_under_their_wire_names() -> None:
    wire = {
        "node-name": "d0",
        "mode": "hard",
        "speed": 5,
        "ratio": 2,
        "read-only": True,
        "detect_zeroes": "on",
        "bitmaps": ["a"],
        "address": {"host": "h"},
        "extra": {"x": [1]},
    }
    assert parse_arguments(Arguments, wire) == Arguments(
        "d0", Mode.HARD, 5, 2.0, True, "on", ["a"], Address("h"), {"x": [1]}
    )


def test_optional_members_may_be_missing() -> None:
    assert parse_arguments(Arguments, {"node-name": "d0"}) == Arguments("d0")


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ({}, "Parameter 'node-name' is missing"),
        ({"node-name": "x", "nope": 1}, "Parameter 'nope' is unexpected"),
        ({"node-name": 1}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": None}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": "x", "mode": "mild"}, "Parameter 'mode' does not accept value 'mild'"),
        ({"node-name": "x", "mode": 1}, "Invalid parameter type for 'mode', expected: string"),
        (
            {"node-name": "x", "speed": True},
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            {"node-name": "x", "speed": None},
            "Invalid parameter type for 'speed', expected: integer",
        ),
        ({"node-name": "x", "ratio": "1"}, "Invalid parameter type for 'ratio', expected: number"),
        (
            {"node-name": "x", "read-only": 1},
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (
            {"node-name": "x", "bitmaps": "a"},
            "Invalid parameter type for 'bitmaps', expected: array",
        ),
        (
            {"node-name": "x", "bitmaps": ["a", 1]},
            "Invalid parameter type for 'bitmaps[1]', expected: string",
        ),
        (
            {"node-name": "x", "address": 1},
            "Invalid parameter type for 'address', expected: object",
        ),
        ({"node-name": "x", "address": {}}, "Parameter 'address.host' is missing"),
        (
            {"node-name": "x", "address": {"host": "h", "y": 1}},
            "Parameter 'address.y' is unexpected",
        ),
        ({"node-name": "x", "extra": []}, "Invalid parameter type for 'extra', expected: object"),
    ],
)
def test_bad_member_is_refused_by_name(wire: dict[str, Any], message: str) -> None:
    with pytest.raises(QmpError) as caught:
        parse_arguments(Arguments, wire)
    assert caught.value.desc == message


def test_no_arguments_refuses_any() -> None:
    assert parse_arguments(NoArguments, {}) == NoArguments()
    with pytest.raises(QmpError, match="Parameter 'x' is unexpected"):
        parse_arguments(NoArguments, {"x": 1})
