# SPDX-License-Identifier: Apache-2.0
"""Who may come in, by QEMU's authz objects."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.crypto.authorization import Authorizer, read_authorizer
from blockemu.drivers.errors import ImageError
from blockemu.loop.small_file import read_small_file
from blockemu.objects import parse_object


def make(text: str) -> Authorizer:
    """As on a command line."""
    kind, object_id, options = parse_object(text)
    return read_authorizer(kind, object_id, dict(options), read_file=read_small_file)


def refusal(text: str) -> str:
    with pytest.raises(ImageError) as caught:
        make(text)
    return str(caught.value)


def test_a_simple_one_is_one_name() -> None:
    authorizer = make("authz-simple,id=a,identity=C=GB,,CN=laptop")
    assert authorizer.allows("C=GB,CN=laptop")
    assert not authorizer.allows("C=GB,CN=laptop2")


def test_the_first_rule_that_matches_decides() -> None:
    authorizer = make(
        "authz-list,id=a,policy=deny,rules.0.match=CN=bad*,rules.0.policy=deny,rules.0.format=glob,"
        "rules.1.match=CN=*,rules.1.policy=allow,rules.1.format=glob"
    )
    assert authorizer.allows("CN=good")
    assert not authorizer.allows("CN=bad one")
    assert not authorizer.allows("O=good")


def test_a_name_is_matched_exactly_unless_told_otherwise() -> None:
    authorizer = make("authz-list,id=a,rules.0.match=CN=*,rules.0.policy=allow")
    assert authorizer.allows("CN=*")
    assert not authorizer.allows("CN=x")


@pytest.mark.parametrize("policy", ["deny", "allow"])
def test_an_empty_list_is_its_policy(policy: str) -> None:
    assert make(f"authz-list,id=a,policy={policy}").allows("x") == (policy == "allow")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("authz-simple,id=a", "authz-simple 'a': option 'identity' is missing"),
        ("authz-simple,id=a,identity=x,policy=allow", "there is no option 'policy'"),
        ("authz-list,id=a,policy=maybe", "option 'policy' is one of deny, allow"),
        ("authz-list,id=a,rules.1.match=x", "aren't numbered from 0 on"),
        ("authz-list,id=a,rules.0.policy=allow", "rule 0: option 'match' is missing"),
        ("authz-list,id=a,rules.0.match=x,rules.0.format=regex", "one of exact, glob"),
        ("authz-list,id=a,rules.0.what=x", "there is no option 'rules.0.what'"),
        ("authz-list,id=a,rules=x", "'rules' is a list of objects"),
        ("authz-list-file,id=a", "option 'filename' is missing"),
        ("authz-list-file,id=a,filename=/none", "/none: No such file"),
        ("authz-pam,id=a", "there is no object type 'authz-pam'"),
    ],
)
def test_what_cant_be_meant_is_one_line(text: str, reason: str) -> None:
    assert reason in refusal(text)


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def test_a_file_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "list"
    write(path, rules=[{"match": "fred", "policy": "allow"}])
    fresh, stale = (make(f"authz-list-file,id=a,filename={path}{x}") for x in ("", ",refresh=off"))
    assert fresh.allows("fred")
    write(path, policy="allow", rules=[{"match": "fred", "policy": "deny"}])
    assert not fresh.allows("fred")
    assert fresh.allows("anybody")
    assert stale.allows("fred")
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert not fresh.allows("anybody")
    assert "isn't JSON; nobody is let in" in caplog.text
    path.unlink()
    assert not fresh.allows("anybody")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[", "isn't JSON"), ("[]", "isn't an object"), ('{"rule": []}', "no option 'rule'")],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "list"
    path.write_text(text)
    assert refusal(f"authz-list-file,id=a,filename={path}").startswith(f"{path}")
    assert reason in refusal(f"authz-list-file,id=a,filename={path}")
