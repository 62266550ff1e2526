# SPDX-License-Identifier: Apache-2.0
"""One real daemon for all tests of the document, as shipped and without its C code.

Exports: "disk", raw, the default; "sparse", qcow2, half of whose clusters were never written. The
daemon of `read_only_server` serves "disk" for reading only. Tests write where nobody else reads:
the first `CONTENT_BYTES` of "disk" keep their content, what lies behind is anybody's.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.peers.certificates import make_pki
from tests.protocol.client import EXTENDED, SIMPLE, STRUCTURED, Client

KIB, MIB = 1 << 10, 1 << 20
DISK_BYTES = 68 * MIB + 512
CONTENT_BYTES = 256 * KIB
CONTENT = random.Random(5).randbytes(CONTENT_BYTES)
SCRATCH = 1 * MIB
"""Where tests may write."""

SPARSE_BYTES = 1 * MIB
SPARSE_STEP = 64 * KIB
"""Every second of these was written (with ones)."""

STYLES = (SIMPLE, STRUCTURED, EXTENDED)

Connect = Callable[..., Client]


class ProtocolServer(BlockemuDaemon):
    """The daemon, and what a test checks of it besides its words."""

    def assert_well(self) -> None:
        """It lives, and no bug of its own came up."""
        assert self.running
        assert "Traceback" not in self.stderr, self.stderr


@pytest.fixture(scope="session")
def protocol_dir() -> Iterator[Path]:
    """Images and sockets of this folder's tests; in memory, as none is about the disk."""
    folder = Path(tempfile.mkdtemp(prefix="bemu-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def _start(
    folder: Path, name: str, native: str, *, read_only: bool, tls: str | None
) -> ProtocolServer:
    disk = folder / f"{name}.raw"
    with disk.open("wb") as file:
        file.write(CONTENT)
        file.truncate(DISK_BYTES)
    sparse = folder / f"{name}.sparse"
    with sparse.open("wb") as file:
        for start in range(0, SPARSE_BYTES, 2 * SPARSE_STEP):
            file.seek(start)
            file.write(b"\1" * SPARSE_STEP)
        file.truncate(SPARSE_BYTES)
    extra = ["--name", "disk", "--name", "sparse", "--iothread", "both"]
    if tls is not None:
        credentials = f"tls-creds-x509,id=tls0,dir={folder / 'pki'},endpoint=server"
        extra += ["--object", credentials, "--tls-creds", "tls0", "--tls", tls]
    server = ProtocolServer(
        disk,
        sparse,
        fmt="raw",
        socket_path=folder / f"{name}.sock",
        read_only=read_only,
        extra=extra,
    )
    server.environment["BLOCKEMU_NATIVE"] = native
    return server


class Servers:
    """Daemons by their kind, started when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._started: dict[str, ProtocolServer] = {}
        self.pki = make_pki(folder)

    def get(
        self, native: str, *, read_only: bool = False, tls: str | None = None
    ) -> ProtocolServer:
        """The one that is as asked for."""
        key = name = f"{'ro' if read_only else 'rw'}{native}{tls or ''}"
        if key not in self._started:
            server = _start(self._folder, name, native, read_only=read_only, tls=tls)
            self._started[key] = self._stack.enter_context(server)
        return self._started[key]

    def stop(self) -> None:
        """All, in good order."""
        for server in self._started.values():
            server.assert_well()
        self._stack.close()


@pytest.fixture(scope="session")
def servers(protocol_dir: Path) -> Iterator[Servers]:
    """Of the whole run."""
    started = Servers(protocol_dir)
    yield started
    started.stop()


@pytest.fixture(params=["1", "0"], ids=["native", "python"])
def native(request: pytest.FixtureRequest) -> str:
    """BLOCKEMU_NATIVE of the daemon."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def server(servers: Servers, native: str) -> ProtocolServer:
    """Writable exports."""
    return servers.get(native)


@pytest.fixture
def read_only_server(servers: Servers, native: str) -> ProtocolServer:
    """The same, for reading only."""
    return servers.get(native, read_only=True)


@pytest.fixture
def connect(server: ProtocolServer) -> Iterator[Connect]:
    """Connections in negotiation, closed at the end."""
    made: list[Client] = []

    def greeted(client_flags: int = 3) -> Client:
        made.append(Client.greeted(server.socket_path, client_flags))
        return made[-1]

    yield greeted
    for client in made:
        client.close()
    server.assert_well()


@pytest.fixture
def client(connect: Connect) -> Client:
    """A connection in negotiation."""
    return connect()


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    """Each style of replies in turn."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def disk(connect: Connect, style: str) -> Client:
    """A connection to "disk" in transmission, in each style of replies."""
    client = connect()
    client.negotiate(style)
    client.go("disk")
    return client


@pytest.fixture
def plain(connect: Connect) -> Client:
    """A connection to "disk" in transmission that negotiated nothing."""
    client = connect()
    client.go("disk")
    return client


@pytest.fixture(params=STYLES)
def locked(request: pytest.FixtureRequest, read_only_server: ProtocolServer) -> Iterator[Client]:
    """A connection to a read-only "disk", in each style of replies."""
    with Client.entered(read_only_server.socket_path, "disk", style=request.param) as client:
        yield client
