# SPDX-License-Identifier: Apache-2.0
"""Addresses alone: URIs, options, and the name that is shown."""

from __future__ import annotations

from typing import Any

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.address import NbdAddress, parse_uri, take_address


def address_of(uri: str) -> NbdAddress:
    options = parse_uri(uri)
    assert options.pop("driver") == "nbd"
    address = take_address("nbd0", options)
    assert not options
    return address


@pytest.mark.parametrize(
    ("uri", "address", "shown"),
    [
        ("nbd://h", NbdAddress(host="h"), "nbd://h:10809"),
        ("nbd://h/", NbdAddress(host="h"), "nbd://h:10809"),
        ("nbd://h:7/a", NbdAddress(host="h", port=7, export="a"), "nbd://h:7/a"),
        ("nbd+tcp://h/a/b", NbdAddress(host="h", export="a/b"), "nbd://h:10809/a/b"),
        ("nbd://[::1]:9/a", NbdAddress(host="::1", port=9, export="a"), "nbd://[::1]:9/a"),
        ("nbd://h/a%20b", NbdAddress(host="h", export="a b"), "nbd://h:10809/a%20b"),
        (
            "nbd+unix:///e?socket=/run/x.sock",
            NbdAddress(path="/run/x.sock", export="e"),
            "nbd+unix:///e?socket=/run/x.sock",
        ),
        ("nbd+unix:///?socket=x", NbdAddress(path="x"), "nbd+unix://?socket=x"),
        ("nbd+unix:///?socket=a+b", NbdAddress(path="a+b"), "nbd+unix://?socket=a+b"),
        ("nbd+unix://?socket=x", NbdAddress(path="x"), "nbd+unix://?socket=x"),
        (
            "nbd+unix:///%C3%A9%FF?socket=/a%26b",
            NbdAddress(path="/a&b", export="é\udcff"),
            "nbd+unix:///%C3%A9%FF?socket=/a%26b",
        ),
    ],
)
def test_uri_is_an_address_and_shown_so_that_it_opens_again(
    uri: str, address: NbdAddress, shown: str
) -> None:
    assert address_of(uri) == address
    assert address.uri == shown
    assert address_of(shown) == address


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nbd://h/x?tls-hostname=y", "goes with nbds:// only"),
        ("nbds+unix:///x?tls-hostname=y", "is no URI of a unix socket"),
        ("nbd+sctp://1/x", "no NBD over 'sctp'"),
        ("nbd:///x", "names no host"),
        ("nbd://h:99999/x", "is no URI"),
        ("nbd://h:x/x", "is no URI"),
        ("nbd://[::1/x", "is no URI"),
        ("nbd://h/x?socket=y", "means nothing"),
        ("nbd+unix:///x", "is no URI of a unix socket"),
        ("nbd+unix:///x?socket=", "is no URI of a unix socket"),
        ("nbd+unix:///x?sock=y", "is no URI of a unix socket"),
        ("nbd+unix:///x?socket=y&socket=z", "is no URI of a unix socket"),
        ("nbd+unix://h/x?socket=y", "is no URI of a unix socket"),
        ("nbd:unix:/x", "is no NBD URI"),
    ],
)
def test_bad_uri_is_one_line_that_names_it(uri: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        parse_uri(uri)
    assert caught.value.name == uri


@pytest.mark.parametrize(
    "options",
    [
        {"server": {"type": "inet", "host": "h", "port": "7"}, "export": "e"},
        {"server.type": "inet", "server.host": "h", "server.port": 7, "export": "e"},
        {"host": "h", "port": "7", "export": "e"},
    ],
)
def test_options_are_an_address(options: dict[str, Any]) -> None:
    assert take_address("n", options) == NbdAddress(host="h", port=7, export="e")
    assert not options


@pytest.mark.parametrize(
    ("server", "address"),
    [
        ({"type": "vsock", "cid": "3", "port": 7}, NbdAddress(cid=3, port=7)),
        ({"type": "fd", "str": "5"}, NbdAddress(fd=5)),
        ({"type": "inet", "host": "h", "ipv6": "off"}, NbdAddress(host="h", ipv6=False)),
        ({"type": "inet", "host": "h", "ipv6": True}, NbdAddress(host="h", ipv4=False)),
        ({"type": "inet", "host": "h", "ipv4": "on"}, NbdAddress(host="h", ipv6=False)),
        ({"type": "inet", "host": "h", "ipv4": "on", "ipv6": "on"}, NbdAddress(host="h")),
        (
            {"type": "inet", "host": "h", "keep-alive": "off"},
            NbdAddress(host="h", keep_alive=False),
        ),
    ],
)
def test_other_kinds_of_servers_are_addresses(server: dict[str, Any], address: NbdAddress) -> None:
    assert take_address("n", {"server": server}) == address


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "option 'server' is missing"),
        ({"server": {"host": "h"}}, "option 'server.type' is missing"),
        ({"server": {"type": "ftp"}}, "one of inet, unix, vsock, fd, not 'ftp'"),
        ({"server": {"type": "vsock"}}, "option 'server.cid' is missing"),
        ({"server": {"type": "vsock", "cid": -1}}, "from 0 to 4294967295, not -1"),
        ({"server": {"type": "fd", "str": "x"}}, "option 'server.str' is a number from 0"),
        (
            {"server": {"type": "inet", "host": "h", "ipv4": "off", "ipv6": "off"}},
            "leave no address",
        ),
        ({"server": {"type": "inet"}}, "option 'server.host' is missing"),
        ({"server": {"type": "inet", "host": ""}}, "is empty"),
        ({"server": {"type": "inet", "host": "h", "port": 0}}, "from 1 to 65535, not 0"),
        ({"server": {"type": "inet", "host": "h", "port": "x"}}, "from 1 to 65535, not 'x'"),
        ({"server": {"type": "inet", "host": "h", "port": True}}, "from 1 to 65535, not True"),
        ({"server": {"type": "unix"}}, "option 'server.path' is missing"),
        ({"server": {"type": "unix", "path": "x" * 108}}, "has 108 bytes, and at most 107"),
        ({"server": {"type": "unix", "path": "a\0b"}}, "has a NUL in it"),
        ({"server": {"type": "unix", "path": "x", "tls": 1}}, "has no option 'server.tls'"),
        ({"server": {"type": "unix", "path": "x"}, "host": "h"}, "says again"),
        ({"path": "x", "host": "h"}, "has no option 'server.host'"),
        ({"path": "x", "export": "e" * 4097}, "has 4097 bytes, and at most 4096"),
        ({"server": "x"}, "takes an object"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        take_address("n", options)
