# SPDX-License-Identifier: Apache-2.0
"""Connecting, without holding up the loop."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockemu.loop.aio_context import AioContext
from blockemu.loop.stream_socket import UNIX_PATH_BYTES_MAX, connect_tcp, connect_unix


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
