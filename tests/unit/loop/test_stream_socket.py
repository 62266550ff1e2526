# SPDX-License-Identifier: Apache-2.0
"""Connecting, without holding up the loop."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockemu.loop.aio_context import AioContext
from blockemu.loop.stream_socket import (
    UNIX_PATH_BYTES_MAX,
    adopt_stream,
    connect_tcp,
    connect_unix,
    connect_vsock,
)


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    context = AioContext("test")
    context.adopt()
    yield context
    context.close()


def test_unix_socket_is_connected_and_non_blocking(ctx: AioContext, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with ctx.run(connect_unix(str(tmp_path / "s"))) as sock:
            assert not sock.getblocking()
            accepted, _ = listener.accept()
            with accepted:
                accepted.send(b"hello")
                assert sock.recv(5) == b"hello"


def test_full_queue_is_waited_for(ctx: AioContext, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(tmp_path / "s"))
            task = ctx.spawn(connect_unix(str(tmp_path / "s")))
            for _ in range(3):
                ctx.poll(blocking=True)
            assert not task.done()
            listener.accept()[0].close()
            while not task.done():
                ctx.poll(blocking=True)
            task.result().close()


@pytest.mark.parametrize(
    ("path", "code"),
    [("gone", errno.ENOENT), ("x" * (UNIX_PATH_BYTES_MAX + 1), errno.ENAMETOOLONG)],
    ids=["gone", "long"],
)
def test_path_without_a_server_is_an_error(
    ctx: AioContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r".") as caught:
        ctx.run(connect_unix(path))
    assert caught.value.errno == code


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_is_connected_or_refused(ctx: AioContext, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        port = listener.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            ctx.run(connect_tcp(host, port))
        listener.listen()
        with ctx.run(connect_tcp(host, port)) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_name_that_is_none_is_an_error(ctx: AioContext) -> None:
    with pytest.raises(OSError, match="not a host name") as caught:
        ctx.run(connect_tcp("a" * 64 + ".invalid", 1))
    assert caught.value.errno == errno.EINVAL


def test_tcp_ends_when_the_peers_host_is_gone(ctx: AioContext) -> None:
    """Silent or not: both within a minute. Nobody asked, it is the kernel's to say."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with ctx.run(connect_tcp("127.0.0.1", port, keep_alive=True)) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = (
                socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT,
                socket.TCP_USER_TIMEOUT,
            )  # fmt: skip
            found = [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options]
            assert found == [30, 10, 3, 60_000]
        with ctx.run(connect_tcp("127.0.0.1", port)) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


@pytest.mark.parametrize(("ipv4", "ipv6"), [(False, True), (True, False)])
def test_only_addresses_of_the_kind_that_was_asked_for_are_tried(
    ctx: AioContext, ipv4: bool, ipv6: bool
) -> None:
    host = "127.0.0.1" if ipv6 else "::1"
    with pytest.raises(OSError, match="family"):
        ctx.run(connect_tcp(host, 1, ipv4=ipv4, ipv6=ipv6))


def test_a_vsock_without_a_peer_is_an_error(ctx: AioContext) -> None:
    """Context id 2^32 - 2 is nobody's."""
    with pytest.raises(OSError):
        ctx.run(connect_vsock(2**32 - 2, 1))


def test_a_socket_that_was_handed_over_is_used(ctx: AioContext) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with adopt_stream(ours.fileno()) as sock:
            assert not sock.getblocking()
            assert not sock.get_inheritable()
            sock.send(b"hello")
            assert theirs.recv(5) == b"hello"
        ours.send(b"still here")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(OSError, match="no stream socket"),
    ):
        adopt_stream(datagrams.fileno())
    with socket.socket() as alone, pytest.raises(OSError, match="not connected"):
        adopt_stream(alone.fileno())
