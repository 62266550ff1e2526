# SPDX-License-Identifier: Apache-2.0
"""How facts are shown that no good server sends, or seldom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockemu.drivers.nbd.address import NbdAddress, parse_uri, take_address
from blockemu.drivers.nbd.protocol import INFO_EXPORT, Option, Reply
from blockemu.nbdinfo.describe import short_size
from blockemu.nbdinfo.map import describe
from blockemu.nbdinfo.qemu_listing import list_exports
from blockemu.nbdinfo.server import uri_of
from tests.peers.process import nbd_uri
from tests.peers.scripted_nbd import SIZE, Client, ScriptedNbd
from tests.unit.nbdinfo.side_by_side import ours

NAMES = (b"a\nb", b"\xff\xfe", "Ü".encode(), b"")


def located(uri: str) -> NbdAddress:
    options = parse_uri(uri)
    del options["driver"]
    return take_address(uri, options)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0"),
        (1, "1"),
        (1023, "1023"),
        (1024, "1K"),
        (1536 << 10, "1536K"),
        (1025 << 20, "1025M"),
        (5 << 60, "5E"),
        (1 << 63, "8E"),
    ],
)
def test_a_size_is_in_the_largest_unit_that_divides_it(size: int, shown: str) -> None:
    assert short_size(size) == shown


@pytest.mark.parametrize(
    ("context", "state", "meaning"),
    [
        ("base:allocation", 4, None),
        ("qemu:dirty-bitmap:x", 2, None),
        ("qemu:allocation-depth", 7, "backing depth 7"),
        ("x-other:thing", 0, None),
    ],
)
def test_what_is_not_known_has_no_meaning(context: str, state: int, meaning: str | None) -> None:
    assert describe(context, state) == meaning


@pytest.mark.parametrize(
    ("uri", "whole"),
    [
        ("nbd://localhost", "nbd://localhost:10809/"),
        ("nbd://[::1]:1/a%20b", "nbd://[::1]:1/a%20b"),
        ("nbd+unix:///?socket=/a%20b", "nbd+unix:///?socket=/a%20b"),
    ],
)
def test_a_uri_is_shown_with_all_its_parts(uri: str, whole: str) -> None:
    assert uri_of(located(uri)) == whole


def serve(client: Client) -> None:
    """Exports with strange names, and no description."""
    client.greet()
    while True:
        option, _ = client.option()
        if option == Option.NBD_OPT_LIST:
            for name in NAMES:
                entry = len(name).to_bytes(4, "big") + name
                client.reply(option, Reply.NBD_REP_SERVER, entry)
            client.reply(option, Reply.NBD_REP_ACK)
        elif option == Option.NBD_OPT_INFO:
            client.reply(option, Reply.NBD_REP_INFO, INFO_EXPORT.pack(0, SIZE, 1))
            client.reply(option, Reply.NBD_REP_ACK)
        else:
            client.reply(option, Reply.NBD_REP_ERR_UNSUP)


def test_strange_names_stay_on_their_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ScriptedNbd(tmp_path / "s", serve):
        human = ours(capfd, "list", nbd_uri(tmp_path / "s"))
        machine = ours(capfd, "list", "--json", nbd_uri(tmp_path / "s"))
        listing = list(list_exports(located(nbd_uri(tmp_path / "s"))))
    assert human.code == machine.code == 0
    assert human.out.count("export=") == len(NAMES)
    assert 'export="a\\nb":\n' in human.out
    names = [export["export-name"] for export in json.loads(machine.out)["exports"]]
    assert [name.encode(errors="surrogateescape") for name in names] == list(NAMES)
    assert listing[0] == f"exports available: {len(NAMES)}"
