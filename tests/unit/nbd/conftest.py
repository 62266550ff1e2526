# SPDX-License-Identifier: Apache-2.0
"""A server's end and a client's end of one connection, in one thread, on a clock that stands still."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from blockemu.exports import Export
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.nbd.transmission import Connection
from tests.unit.nbd.client import Client
from tests.unit.nbd.fakes import FakeBackend

DISK_BYTES = 2 << 20


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def ctx(clock: VirtualClock) -> Iterator[AioContext]:
    """The one context; what goes wrong in it without anybody to tell fails the test."""
    ctx = AioContext("test", clock=clock)
    errors: list[tuple[str, Exception]] = []
    ctx.exception_handler = lambda what, error: errors.append((what, error))
    yield ctx
    ctx.close()
    assert not errors


@dataclass
class Served:
    """A connection in transmission."""

    connection: Connection
    client: Client
    backend: FakeBackend
    export: Export
    closed: list[bool] = field(default_factory=list)


Serve = Callable[..., Served]


@pytest.fixture
def serve(ctx: AioContext) -> Iterator[Serve]:
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
    ) -> Served:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        backend = backend or FakeBackend(ctx, length_bytes, mapped=mapped)
        export = export or Export("disk", backend.as_backend, read_only=read_only)
        closed: list[bool] = []
        connection = Connection(
            ours, export, limits=limits or Limits(), on_closed=lambda: closed.append(True)
        )
        served = Served(connection, Client(theirs, ctx), backend, export, closed)
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
