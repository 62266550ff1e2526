# SPDX-License-Identifier: Apache-2.0
"""What only a connection under TLS can show; all else is in the tests of the transmission phase,
which run over TLS, too."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from blockemu.drivers.nbd.protocol import Command
from blockemu.exports import Export
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.nbd.server import make_connection
from blockemu.nbd.session import Session
from blockemu.nbd.tls_connection import TlsConnection
from tests.peers.certificates import Pki
from tests.unit.nbd.client import Client, header
from tests.unit.nbd.conftest import DISK_BYTES, tls_pair
from tests.unit.nbd.fakes import FakeBackend

READ = Command.NBD_CMD_READ


class Secure:
    """A connection under TLS and its client."""

    def __init__(self, ctx: AioContext, pki: Pki) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.raw = theirs
        self.backend = FakeBackend(ctx, DISK_BYTES, mapped=True)
        self.export = Export("disk", self.backend.as_backend)
        self.client = Client(theirs, ctx)
        self.stream = tls_pair(ours, self.client, pki)
        self.closed: list[bool] = []
        made = make_connection(
            ours,
            Session(self.export, tls=self.stream),
            limits=Limits(),
            on_closed=lambda: self.closed.append(True),
        )
        assert isinstance(made, TlsConnection)
        self.connection = made
        ctx.schedule_oneshot(made.start)
        self.client.rounds(2)


@pytest.fixture
def secure(ctx: AioContext, pki: Pki) -> Iterator[Secure]:
    made = Secure(ctx, pki)
    yield made
    made.client.sock.close()
    made.client.until(lambda: made.closed == [True])


def flood(secure: Secure) -> int:
    """Sends more requests than one look at the stream takes in; how many."""
    count = 3000
    data = b"".join(header(READ, cookie=i, length=1) for i in range(count))
    assert secure.client.sock.send(data) == len(data)
    return count


@pytest.fixture
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a stream takes in 4 KiB."""
    monkeypatch.setattr("blockemu.loop.tls_stream.RECEIVE_BYTES_MAX", 4096)


@pytest.mark.usefixtures("short_looks")
def test_input_inside_the_stream_is_served_without_a_poll(secure: Secure) -> None:
    """All of it has left the kernel: no socket is readable any more."""
    count = flood(secure)
    assert [secure.client.reply(1)[0] for _ in range(count)] == list(range(count))


@pytest.mark.usefixtures("short_looks")
def test_input_inside_the_stream_waits_for_the_end_of_a_drained_section(secure: Secure) -> None:
    count = flood(secure)
    secure.connection._on_readable()
    assert secure.stream.buffered
    secure.export._drained_begin()
    begun = len(secure.backend.file.calls)
    secure.client.rounds(20)
    assert len(secure.backend.file.calls) == begun
    secure.export._drained_end()
    assert [secure.client.reply(1)[0] for _ in range(count)] == list(range(count))


def test_what_was_tampered_with_ends_the_connection_before_it_means_anything(
    secure: Secure,
) -> None:
    secure.raw.send(b"\x17\x03\x03\x00\x40" + bytes(64))
    secure.client.rounds()
    assert secure.closed == [True]
    assert not secure.backend.file.calls


def test_plaintext_in_the_middle_ends_the_connection(secure: Secure) -> None:
    secure.raw.send(header(READ, length=8))
    secure.client.rounds()
    assert secure.closed == [True]
    assert not secure.backend.file.calls


@pytest.mark.usefixtures("short_looks")
def test_a_payload_inside_the_stream_is_not_written_in_a_drained_section(secure: Secure) -> None:
    data = bytes(range(256)) * 400
    message = header(Command.NBD_CMD_WRITE, cookie=7, length=len(data)) + data
    assert secure.client.sock.send(message) == len(message)
    secure.connection._on_readable()
    secure.export._drained_begin()
    secure.client.rounds(50)
    assert not secure.backend.file.calls
    secure.export._drained_end()
    assert secure.client.reply() == (7, 0, b"")
    assert secure.backend.file.disk[: len(data)] == data
