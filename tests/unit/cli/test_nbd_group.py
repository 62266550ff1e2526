# SPDX-License-Identifier: Apache-2.0
"""The first word behind `blockemu nbd` decides: a command's name, or else qemu-nbd's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from blockemu import qemu_nbd
from blockemu.addresses import TcpAddress
from blockemu.cli import cli
from blockemu.cli.nbd_options import snapshot_name
from blockemu.cli.verbosity import CliState
from blockemu.qemu_nbd import NbdRequest, config_of


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[NbdRequest]:
    """What `serve_image` was asked to serve, and isn't."""
    requests: list[NbdRequest] = []

    def serve_image(request: NbdRequest, **_: Any) -> None:
        requests.append(request)

    monkeypatch.setattr(qemu_nbd, "serve_image", serve_image)
    return requests


@pytest.mark.parametrize(
    ("words", "image"),
    [
        (["disk"], "disk"),
        (["-t", "disk"], "disk"),
        (["serve", "disk"], "disk"),
        (["serve", "serve"], "serve"),
        (["./list"], "./list"),
        (["-r", "list"], "list"),
        (["--", "-disk"], "-disk"),
    ],
)
def test_what_names_no_command_is_served(
    served: list[NbdRequest], words: list[str], image: str
) -> None:
    result = CliRunner().invoke(cli, ["nbd", *words], obj=CliState(), catch_exceptions=False)
    assert (result.exit_code, result.output) == (0, "")
    assert [request.image for request in served] == [image]


@pytest.mark.parametrize("words", [["list"], ["info"], ["list", "disk"]])
def test_what_names_a_command_is_not_served(served: list[NbdRequest], words: list[str]) -> None:
    assert CliRunner().invoke(cli, ["nbd", *words]).exit_code != 0
    assert served == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("before", "before"),
        ("snapshot.id=1", "1"),
        ("snapshot.name=a=b", "a=b"),
        ("a,b", "a,b"),
        ("id=1", "id=1"),
    ],
)
def test_a_snapshot_is_named_in_qemu_nbds_ways(text: str, name: str) -> None:
    assert snapshot_name(text) == name


@pytest.mark.parametrize("text", ["snapshot.id=1,snapshot.name=x", "snapshot.id=1,x"])
def test_a_snapshot_has_one_name(text: str) -> None:
    with pytest.raises(click.UsageError, match=r"takes snapshot\.id=ID"):
        snapshot_name(text)


def test_cache_modes_are_what_they_are_in_qemu(tmp_path: Path) -> None:
    """(past the host's cache, each write on disk, no flushes)"""
    found = {}
    for cache in ("writeback", "none", "writethrough", "directsync", "unsafe"):
        config = config_of(
            NbdRequest(image=str(tmp_path / "x"), addresses=(TcpAddress(),), cache=cache)
        )
        (image,) = config.images
        found[cache] = image.direct, image.export.write_through, image.no_flush
    assert found == {
        "writeback": (False, False, False),
        "none": (True, False, False),
        "writethrough": (False, True, False),
        "directsync": (True, True, False),
        "unsafe": (False, False, True),
    }
