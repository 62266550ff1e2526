# SPDX-License-Identifier: Apache-2.0
"""The receive buffer alone: what lands where."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from blockemu.drivers.nbd.receive_buffer import (
    CAPACITY_BYTES,
    LOOK_AHEAD_BYTES,
    WAIT_BYTES_MAX,
    ReceiveBuffer,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def test_what_arrives_is_kept_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    received = ReceiveBuffer()
    pair[1].send(b"abc")
    received.fill(pair[0])
    pair[1].send(b"def")
    received.fill(pair[0])
    assert received.data[received.start : received.end] == b"abcdef"


def test_an_empty_socket_says_so(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        ReceiveBuffer().fill(pair[0])


def test_there_is_always_room_for_a_payload_that_waits(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    received = ReceiveBuffer()
    received.start, received.end = CAPACITY_BYTES - 1000, CAPACITY_BYTES - 900
    received.data[received.start : received.end] = b"k" * 100
    pair[1].send(b"x" * WAIT_BYTES_MAX)
    while received.end - received.start < 100 + WAIT_BYTES_MAX:
        received.fill(pair[0])
    kept = received.data[received.start : received.end]
    assert kept == b"k" * 100 + b"x" * WAIT_BYTES_MAX


def test_an_expected_payload_lands_in_its_target(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    content = random.Random(3).randbytes(100_000)
    received, target = ReceiveBuffer(), bytearray(100_000)
    pair[1].send(content[:10])
    received.fill(pair[0])
    received.expect(memoryview(target))
    sent = 10
    while received.expecting:
        sent += pair[1].send(content[sent : sent + 30_000] + b"next" * (sent > 70_000))
        received.fill(pair[0])
    assert target == content
    assert bytes(received.data[received.start : received.end]) in b"next"
    assert received.end <= LOOK_AHEAD_BYTES


def test_a_discarded_payload_is_dropped_and_the_rest_kept(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    received = ReceiveBuffer()
    pair[1].send(b"abc")
    received.fill(pair[0])
    received.discard(5)
    assert received.discard_left == 2
    pair[1].send(b"defgh")
    received.fill(pair[0])
    assert received.discard_left == 0
    assert received.data[received.start : received.end] == b"fgh"
