# SPDX-License-Identifier: Apache-2.0
"""A control server on a loop of the test's own, around a daemon that is only a stub."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockemu.drivers.crypto.offload import in_place
from blockemu.drivers.crypto.user_objects import UserObjects
from blockemu.exports import ExportTable
from blockemu.loop.aio_context import AioContext
from blockemu.qmp.server import QmpServer
from tests.unit.qmp.qmp_client import LoopClient


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    context = AioContext("test")
    context.adopt()
    yield context
    context.close()


@pytest.fixture
def daemon() -> Any:
    stub = SimpleNamespace(
        exports=ExportTable(),
        iothreads={},
        opener=SimpleNamespace(nodes={}, objects=UserObjects(), offload=in_place),
        stop_count=0,
    )

    def stop() -> None:
        stub.stop_count += 1

    stub.stop = stop
    return stub


@pytest.fixture
def server(ctx: AioContext, daemon: Any, tmp_path: Path) -> Iterator[QmpServer]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(100)
        listener.setblocking(False)
        server = QmpServer(ctx, daemon)
        server.listen(listener)
        yield server
        server.close()


@pytest.fixture
def connect(
    ctx: AioContext, server: QmpServer, tmp_path: Path
) -> Iterator[Callable[[], LoopClient]]:
    """Makes clients that haven't read the greeting yet."""
    clients = []

    def make() -> LoopClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "qmp"))
        clients.append(LoopClient(ctx, sock))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Callable[[], LoopClient]) -> LoopClient:
    """A client that has negotiated."""
    made = connect()
    made.receive()
    assert made.execute("qmp_capabilities") == {"return": {}}
    return made
