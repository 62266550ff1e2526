# SPDX-License-Identifier: Apache-2.0
"""object-add and object-del: secrets, which no answer and no log shows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from blockemu.qmp.commands.objects import ObjectAddArguments
from tests.unit.qmp.qmp_client import LoopClient


def add(client: LoopClient, **arguments: Any) -> dict[str, Any]:
    return client.execute("object-add", {"qom-type": "secret", "id": "sec0", **arguments})


def test_a_secret_is_added_once_and_deleted_once(client: LoopClient, tmp_path: Path) -> None:
    file = tmp_path / "pass"
    file.write_bytes(b"correct horse")
    assert add(client, file=str(file)) == {"return": {}}
    assert "exists already" in add(client, data="x")["error"]["desc"]
    assert client.execute("object-del", {"id": "sec0"}) == {"return": {}}
    gone = client.execute("object-del", {"id": "sec0"})
    assert gone["error"]["desc"] == "object 'sec0' not found"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"qom-type": "iothread"}, "'qom-type' does not accept value 'iothread'"),
        ({}, "takes one of 'file' and 'data'"),
        ({"file": "/none/such"}, "/none/such: No such file"),
        ({"file": "/dev/zero"}, "too long for a secret"),
        ({"data": "correct horse", "format": "base64"}, "not base64"),
        ({"data": "correct horse", "format": "hex"}, "raw or base64"),
        ({"data": "correct horse", "iv": "x"}, "'iv' is unexpected"),
    ],
)
def test_what_is_no_secret_is_refused_without_showing_it(
    client: LoopClient, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any], reason: str
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = add(client, **arguments)
    assert reason in answer["error"]["desc"]
    assert "horse" not in str(answer) + caplog.text


def test_arguments_show_no_secret() -> None:
    assert "horse" not in repr(ObjectAddArguments("secret", "sec0", data="correct horse"))
