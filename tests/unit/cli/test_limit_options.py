# SPDX-License-Identifier: Apache-2.0
"""Limits by name: all can be set, nonsense is refused with one line that names it."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from pathlib import Path

import pytest
from click.testing import CliRunner

from blockemu import limits as limits_module
from blockemu.cli import cli
from blockemu.errors import DaemonError
from blockemu.limit_settings import describe_limits, limit_names, parse_limits
from blockemu.limits import Limits

SECOND_NS = 10**9


def test_every_limit_has_a_name_of_its_own_and_a_default_that_can_be_set() -> None:
    assert len(limit_names()) == len(dataclasses.fields(Limits))
    assert parse_limits(describe_limits().split(", ")) == Limits()


def test_every_limit_is_named_by_a_test_of_it() -> None:
    tests = Path(__file__).resolve().parents[2]
    texts = [path.read_text() for path in tests.rglob("test_*.py")]
    fields = [field.name for field in dataclasses.fields(Limits)]
    unnamed = [name for name in fields if not any(name in text for text in texts)]
    assert not unnamed, "show in a test that they bound what they are for"


def test_every_limit_tells_its_reason() -> None:
    (body,) = [
        node.body
        for node in ast.parse(Path(limits_module.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Limits"
    ]
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(following, ast.Expr), ast.unparse(node)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("connections=7", "connections_max", 7),
        ("negotiation-time=500ms", "negotiation_time_max_ns", SECOND_NS // 2),
        ("negotiation-time=1.5", "negotiation_time_max_ns", 3 * SECOND_NS // 2),
        ("close-linger=2m", "close_linger_ns", 120 * SECOND_NS),
        ("option-length=64k", "option_length_max", 65536),
    ],
)
def test_a_limit_is_set_in_its_unit(text: str, field: str, value: int) -> None:
    assert parse_limits([text]) == dataclasses.replace(Limits(), **{field: value})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("clients=5", "limit 'clients': unknown; there are connections,"),
        ("connections", "limit 'connections': lacks its value: connections=VALUE"),
        ("connections=", "limit 'connections': '' is not a number"),
        ("connections=0", "limit 'connections': 0 is not between 1 and 2147483647"),
        ("connections=-1", "limit 'connections': '-1' is not a number"),
        ("connections=1e3", "limit 'connections': '1e3' is not a number"),
        ("connections=99999999999", "is not between 1 and 2147483647"),
        ("option-length=many", "limit 'option-length': 'many' is not a size"),
        ("in-flight-bytes=2E", "limit 'in-flight-bytes': 2E is not between 1 and"),
        ("negotiation-time=10h", "limit 'negotiation-time': '10h' is not a time"),
        ("negotiation-time=0", "is not between 1ns and 24 hours"),
        ("request-length=1G", "limits: request_length_max (1073741824) is more than"),
        ("status-reply-bytes=65M", "limits: status_reply_bytes_max (68157440) is more than"),
        ("in-flight-bytes=32767K", "is more than in_flight_bytes_max (33553408)"),
        ("memory-bytes=1M", "is more than memory_bytes_max (1048576)"),
        ("keepalive-probes=128", "limits: keepalive_probes_max is more than 127"),
    ],
)
def test_nonsense_is_refused_with_its_name(text: str, complaint: str) -> None:
    with pytest.raises(DaemonError) as caught:
        parse_limits([text])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_serve_lists_its_limits_without_an_image() -> None:
    result = CliRunner().invoke(cli, ["serve", "--limits"])
    assert result.exit_code == 0
    assert "connections=2048\n" in result.output
    assert "negotiation-time=10s\n" in result.output
