# SPDX-License-Identifier: Apache-2.0
"""Both ends of a connection, the server's and the client's, on a clock that doesn't move.

Each test runs twice: once with connections whose data Python moves, and once with native ones; so
that both answer the same. What only one of them can show is marked `kind_only("python", reason)`.
Tests of the transmission phase run in each style of replies on top of that; what the style is no
matter for, or what only one has, is marked `style_only("simple", ...)`.
The fake backends' file is no native one, so a native connection reaches it by way of faults;
test_native_connection.py has real files.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockemu.drivers.nbd.protocol import EXPORT_NAME_REPLY, Option
from blockemu.exports import Export, ExportTable
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.nbd.connection import BaseConnection
from blockemu.nbd.reply_style import STYLES
from blockemu.nbd.server import NbdServer, make_connection
from blockemu.nbd.session import Session
from blockemu.nbd.transmission import Connection
from tests.unit.nbd.client import Client
from tests.unit.nbd.fakes import FakeBackend

DISK_BYTES = 2 << 20


KINDS = ("python", "native")
STYLE_NAMES = tuple(style.name for style in STYLES)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kind_only(kind, reason): only for connections of this kind")
    config.addinivalue_line("markers", "style_only(style, ...): only in these styles of replies")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("kind_only")
        metafunc.parametrize("kind", only.args[:1] if only is not None else KINDS)
    if "style" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("style_only")
        metafunc.parametrize("style", only.args if only is not None else STYLE_NAMES)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def ctx(clock: VirtualClock, kind: str) -> Iterator[AioContext]:
    """The one context; what goes wrong in it without anybody to tell fails the test."""
    ctx = AioContext("test", clock=clock, native=kind == "native")
    errors: list[tuple[str, Exception]] = []
    ctx.exception_handler = lambda what, error: errors.append((what, error))
    yield ctx
    ctx.close()
    assert not errors


@dataclass
class Served:
    """A connection in transmission."""

    connection: BaseConnection
    client: Client
    backend: FakeBackend
    export: Export
    closed: list[bool] = field(default_factory=list)

    @property
    def inside(self) -> Connection | None:
        """The connection, for looks into what only Python's kind has."""
        return self.connection if isinstance(self.connection, Connection) else None

    def until_closed(self) -> None:
        """Nothing of it is left. A native one tells in the next round."""
        self.client.until(lambda: self.closed == [True])


Serve = Callable[..., Served]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


@pytest.fixture
def serve(ctx: AioContext, style: str) -> Iterator[Serve]:
    """Start a connection on a fake backend; at the end all must go without a trace."""
    made: list[Served] = []

    def start(
        *,
        length_bytes: int = DISK_BYTES,
        mapped: bool = False,
        read_only: bool = False,
        limits: Limits | None = None,
        export: Export | None = None,
        backend: FakeBackend | None = None,
        tcp: bool = False,
    ) -> Served:
        ours, theirs = tcp_pair() if tcp else socket.socketpair()
        ours.setblocking(False)
        backend = backend or FakeBackend(ctx, length_bytes, mapped=mapped)
        export = export or Export("disk", backend.as_backend, read_only=read_only)
        closed: list[bool] = []
        session = Session(export, STYLES[STYLE_NAMES.index(style)])
        connection = make_connection(
            ours, session, limits=limits or Limits(), on_closed=lambda: closed.append(True)
        )
        served = Served(connection, Client(theirs, ctx, style=style), backend, export, closed)
        ctx.schedule_oneshot(connection.start)
        served.client.rounds(2)
        made.append(served)
        return served

    yield start
    for served in made:
        served.backend.held = False
        served.backend.file.behaviour = "inline"
        served.client.sock.close()
        served.client.rounds()
        while served.backend.waiting:
            served.backend.end()
        while served.backend.file.pending:
            served.backend.file.complete()
        served.client.rounds()
        served.connection.drop("the test is over")
        served.client.rounds()
        assert served.closed == [True]
        assert served.connection not in served.export.connections
        assert not served.backend.pinned()


@dataclass
class Server:
    """A server on a unix socket with the exports "disk" (the default) and "zweite Platte"."""

    ctx: AioContext
    server: NbdServer
    exports: ExportTable
    backend: FakeBackend
    path: Path
    clients: list[Client] = field(default_factory=list)

    def connect(self) -> Client:
        """A fresh client."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.path))
        except OSError:
            sock.close()
            raise
        self.clients.append(Client(sock, self.ctx))
        return self.clients[-1]

    def enter(self, name: str) -> Client:
        """A client in the transmission phase."""
        client = self.connect()
        self.choose(client, name)
        return client

    def choose(self, client: Client, name: str) -> None:
        """Negotiate an export, in the shortest way."""
        client.greet()
        client.option(Option.NBD_OPT_EXPORT_NAME, name.encode())
        client.receive(EXPORT_NAME_REPLY.size)

    def close(self) -> None:
        """Close the server, with clients as they are; all must be gone then."""
        for client in self.clients:
            client.sock.close()
        while self.backend.waiting:
            self.backend.end()
        self.ctx.run(self.server.close())
        assert not self.server.connection_count


StartServer = Callable[..., Server]


@pytest.fixture
def start_server(ctx: AioContext, tmp_path: Path) -> Iterator[StartServer]:
    """Start a server; at the end it must be able to close without a trace."""
    made: list[Server] = []

    def start(*, limits: Limits | None = None) -> Server:
        exports = ExportTable()
        backend = FakeBackend(ctx, DISK_BYTES)
        exports.add(Export("disk", backend.as_backend, description="the first"))
        second = FakeBackend(ctx, 4096, writable=False)
        exports.add(Export("zweite Platte", second.as_backend))
        path = tmp_path / f"nbd{len(made)}.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(64)
        listener.setblocking(False)
        server = NbdServer(ctx, exports, limits=limits or Limits())
        server.listen(listener)
        made.append(Server(ctx, server, exports, backend, path))
        return made[-1]

    yield start
    for server in made:
        server.close()
