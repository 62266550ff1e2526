# SPDX-License-Identifier: Apache-2.0
"""Addresses as users write them."""

from __future__ import annotations

import grp
import os
import pwd

import click
import pytest

from blockemu.addresses import TcpAddress, VsockAddress, parse_mode, parse_owner, parse_vsock
from blockemu.cli.listener_options import tcp_addresses
from blockemu.errors import DaemonError
from blockemu.uri import vsock_uri


@pytest.mark.parametrize(
    ("text", "cid", "port"),
    [
        ("10809", None, 10809),
        (":10809", None, 10809),
        ("any:1", None, 1),
        ("2:10809", 2, 10809),
        ("vsock://3:70000", 3, 70000),
        ("vsock://any:7/", None, 7),
    ],
)
def test_a_vsock_address_is_a_context_and_a_port(text: str, cid: int | None, port: int) -> None:
    assert parse_vsock(text) == VsockAddress(port=port, cid=cid)


@pytest.mark.parametrize("text", ["", "host:1", "1:", "1:2:3", "-1:5", "vsock:1:2", "tcp://1:2"])
def test_a_bad_vsock_address_is_refused(text: str) -> None:
    with pytest.raises(DaemonError, match="is not CID:PORT"):
        parse_vsock(text)


@pytest.mark.parametrize("text", ["4294967295:1", "1:4294967295", "9999999999"])
def test_a_vsock_number_beyond_32_bits_is_refused(text: str) -> None:
    with pytest.raises(DaemonError, match="numbers are at most 4294967294"):
        parse_vsock(text)


def test_a_vsock_uri_names_the_host_where_any_context_is_heard() -> None:
    assert vsock_uri(None, 10809, "a b") == "nbd+vsock://2:10809/a%20b"
    assert vsock_uri(3, 1, "") == "nbd+vsock://3:1/"


def test_a_mode_is_octal() -> None:
    assert [parse_mode(text) for text in ("660", "0600", "0o777")] == [0o660, 0o600, 0o777]
    for text in ("", "8", "999", "66", "rw-rw----", "4755", "-600"):
        with pytest.raises(DaemonError, match="is not three octal digits"):
            parse_mode(text)


def test_an_owner_is_a_name_or_a_number() -> None:
    user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
    assert parse_owner(user.pw_name) == (user.pw_uid, None)
    assert parse_owner(f"{user.pw_name}:{group.gr_name}") == (user.pw_uid, group.gr_gid)
    assert parse_owner(":12") == (None, 12)
    assert parse_owner("7:8") == (7, 8)
    for text, complaint in (
        ("", "is not USER"),
        (":", "is not USER"),
        ("no such user", "there is no user 'no such user'"),
        (":no such group", "there is no group 'no such group'"),
        ("4294967295", "there is no user '4294967295'"),
    ):
        with pytest.raises(DaemonError, match=complaint):
            parse_owner(text)


def test_ports_go_with_hosts_in_their_order() -> None:
    assert tcp_addresses([], []) == []
    assert tcp_addresses([], [1, 2]) == [TcpAddress(port=1), TcpAddress(port=2)]
    assert tcp_addresses(["a", "b"], []) == [TcpAddress("a", 10809), TcpAddress("b", 10809)]
    assert tcp_addresses(["a", "b"], [7]) == [TcpAddress("a", 7), TcpAddress("b", 7)]
    assert tcp_addresses(["a", "b"], [7, 8]) == [TcpAddress("a", 7), TcpAddress("b", 8)]
    with pytest.raises(click.UsageError, match="3 times for 2"):
        tcp_addresses(["a", "b"], [7, 8, 9])
