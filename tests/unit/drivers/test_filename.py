# SPDX-License-Identifier: Apache-2.0
"""File names alone: what each means, and which are none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import (
    JSON_BYTES_MAX,
    JSON_DEPTH_MAX,
    identity,
    parse_filename,
    parse_image_opts,
    path_to_create,
    resolve,
)

FILE = {"aio": "threads"}


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("disk.img", {"driver": "file", "filename": "disk.img", "aio": "threads"}),
        ("./a:b", {"driver": "file", "filename": "./a:b", "aio": "threads"}),
        ("file:a:b", {"driver": "file", "filename": "a:b", "aio": "threads"}),
        (
            "nbd://h/e",
            {"driver": "nbd", "server": {"type": "inet", "host": "h", "port": "10809"},
             "export": "e"},
        ),
        ('json:{"driver":"null-co","size":512}', {"driver": "null-co", "size": 512}),
        (
            'json:{"driver":"qcow2","file.filename":"x","file":{"driver":"file","aio":"native"}}',
            {"driver": "qcow2", "file": {"driver": "file", "filename": "x", "aio": "native"}},
        ),
        (
            'json:{"driver":"raw","file.filename":"x"}',
            {"driver": "raw", "file": {"driver": "file", "filename": "x", "aio": "threads"}},
        ),
        (
            'json:{"file.driver":"file","file.filename":"x","file.cache.direct":true}',
            {"file": {"driver": "file", "filename": "x", "cache": {"direct": True},
                      "aio": "threads"}},
        ),
    ],
)  # fmt: skip
def test_name_means_options(name: str, tree: dict[str, Any]) -> None:
    assert parse_filename(name, FILE) == tree


DEEP = '{"file":' * (JSON_DEPTH_MAX + 2) + "{}" + "}" * (JSON_DEPTH_MAX + 2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("foo:bar", "Unknown protocol 'foo'"),
        (":bar", "Unknown protocol ''"),
        ("ssh://host/file", "Unknown protocol 'ssh'"),
        ("nbd://host/e?tls-hostname=x", "goes with nbds:// only"),
        ("json:{bad", "Could not parse the JSON options"),
        ("json:", "Could not parse the JSON options"),
        ("json:[]", "Invalid JSON object given"),
        ('json:"x"', "Invalid JSON object given"),
        ('json:{"file":"x","file.driver":"file"}', "says 'file' twice, or as two things"),
        ('json:{"a.b":1,"a":{"b":2}}', "says 'a' twice, or as two things"),
        (f"json:{DEEP}", "objects inside each other"),
        ("json:" + "[" * 20_000, "Could not parse the JSON options"),
        ('json:{"' + "a." * 1000 + '":1}', "objects inside each other"),
        ("json:" + " " * JSON_BYTES_MAX + "{}", "characters"),
    ],
    ids=range(14),
)
def test_name_that_is_none_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_filename(name, FILE)
    assert reason in str(caught.value)
    assert caught.value.name[:20] == name[:20]


@given(st.text(max_size=60))
def test_any_text_is_a_tree_or_an_error(text: str) -> None:
    for name in (text, f"json:{text}", f"nbd://{text}", f"nbd+unix://{text}"):
        try:
            tree = parse_filename(name, FILE)
        except ImageError:
            continue
        assert isinstance(tree, dict)


@given(
    st.recursive(
        st.integers() | st.booleans() | st.none() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("ab.", max_size=4), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_tree_or_an_error(value: object) -> None:
    try:
        tree = parse_filename(f"json:{json.dumps(value)}", FILE)
    except ImageError:
        return
    assert not any("." in key for key in tree if key.strip("."))


@pytest.mark.parametrize(
    ("above", "name", "resolved"),
    [
        ("/a/b/top.qcow2", "base.qcow2", "/a/b/base.qcow2"),
        ("/a/b/top.qcow2", "/c/base.qcow2", "/c/base.qcow2"),
        ("top.qcow2", "sub/base", "sub/base"),
        ("top.qcow2", "./with:colon", "./with:colon"),
        ("file:/a/top.qcow2", "base", "/a/base"),
        # QEMU: a name with a protocol is the same from everywhere.
        ("/a/b/top.qcow2", "file:base", "file:base"),
        ("/a/top.qcow2", "nbd://localhost/x", "nbd://localhost/x"),
        ("/a/top.qcow2", 'json:{"driver":"null-co"}', 'json:{"driver":"null-co"}'),
        ("nbd://localhost/x", "/c/base", "/c/base"),
    ],
)
def test_backing_name_is_relative_to_its_image(above: str, name: str, resolved: str) -> None:
    assert resolve(name, above=above) == resolved


def test_backing_name_of_unknown_protocol_is_refused() -> None:
    with pytest.raises(ImageError, match=r"^/a/top: backing file 'ssh:h/f': Unknown protocol"):
        resolve("ssh:h/f", above="/a/top")


def test_relative_backing_name_of_an_export_is_refused() -> None:
    with pytest.raises(ImageError, match="is relative to what has no folder"):
        resolve("base.raw", above="nbd://localhost/x")


def test_names_of_one_file_have_one_identity(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    link = tmp_path / "b"
    link.symlink_to(path)
    inner = json.dumps({"driver": "file", "filename": str(link)})
    names = (
        str(link),
        f"file:{link}",
        f"json:{inner}",
        f'json:{{"driver":"raw","file":{inner}}}',
        os.path.relpath(path),
    )
    assert {identity(name) for name in names} == {str(path)}
    assert identity("nbd://h/a") != identity("nbd://h/b")


def test_an_image_is_created_at_a_path_only() -> None:
    assert path_to_create("file:x") == "x"
    for name in ("nbd://h/x", 'json:{"driver":"null-co"}'):
        with pytest.raises(ImageError, match="can't be created there"):
            path_to_create(name)
    with pytest.raises(ImageError, match="Unknown protocol 'foo'"):
        path_to_create("foo:x")


def test_image_opts_are_a_tree() -> None:
    tree = {"driver": "qcow2", "file": {"driver": "file", "filename": "a,b"}}
    assert parse_image_opts("driver=qcow2,file.driver=file,file.filename=a,,b") == tree
    for text in ("", "qcow2", "=x", "driver=raw,,file=x,y"):
        with pytest.raises(ImageError, match="isn't KEY=VALUE"):
            parse_image_opts(text)
