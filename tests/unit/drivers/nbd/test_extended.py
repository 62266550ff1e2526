# SPDX-License-Identifier: Apache-2.0
"""Extended headers, and requests cut to what a server takes: what leaves for the server."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.nbd.driver import split
from blockemu.drivers.nbd.protocol import EXTENDED_REPLY, NBD_EXTENDED_REPLY_MAGIC
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from tests.peers.scripted_nbd import Client, ScriptedNbd

GIB = 1 << 30
SIZE = 100 * GIB
FLAGS = 0x86D
"""HAS_FLAGS, SEND_FLUSH, FUA, TRIM, WRITE_ZEROES, FAST_ZERO."""
READ, WRITE, DISC, TRIM, ZEROES, STATUS = 0, 1, 2, 4, 6, 7
PAYLOAD_LEN, REQ_ONE, FAST_ZERO, NO_HOLE, FUA = 32, 8, 16, 2, 1
Log = list[tuple[int, int, int, int]]


def serve_extended(client: Client, log: Log) -> None:
    client.negotiate(size=SIZE, flags=FLAGS, extended=True)
    while True:
        head = struct.unpack(">IHH8sQQ", client.receive(32))
        magic, flags, command, cookie, offset, length = head
        assert magic == 0x21E41C71
        log.append((command, flags, offset, length))
        if command == DISC:
            return
        kind, payload = 0, b""
        if command == WRITE:
            client.receive(length)
        elif command == READ:
            kind, payload = 2, struct.pack(">QI", offset, length)
        elif command == STATUS:
            kind, payload = 6, struct.pack(">IIQQ", 1, 1, length - 512, 3)
        client.send(
            EXTENDED_REPLY.pack(
                NBD_EXTENDED_REPLY_MAGIC, 1, kind, int.from_bytes(cookie, "big"), offset,
                len(payload),
            ) + payload
        )  # fmt: skip


@contextmanager
def opened(ctx: AioContext, opener: Opener, path: Path, serve: Any) -> Iterator[BlockDriverState]:
    with ScriptedNbd(path, serve):
        node = ctx.run(opener.open({"driver": "nbd", "path": str(path)}))
        try:
            yield node
        finally:
            ctx.run(node.close())


def test_requests_of_64_bits_go_in_one(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    log: Log = []
    with opened(ctx, opener, tmp_path / "s", lambda client: serve_extended(client, log)) as node:
        ctx.run(node.pdiscard(0, SIZE))
        ctx.run(node.pwrite_zeroes(0, SIZE, RequestFlags.MAY_UNMAP | RequestFlags.NO_FALLBACK))
        ctx.run(node.pwrite_zeroes(GIB, 5 * GIB, RequestFlags.FUA))
        status = ctx.run(node.block_status(0, SIZE))
        assert (status.length, status.data, status.zero) == (SIZE - 512, False, True)
        ctx.run(node.pwritev(GIB, memoryview(b"x" * 512), RequestFlags.FUA))
        view = memoryview(bytearray(b"x" * 200_192))
        ctx.run(node.preadv(GIB, view))
        assert not any(view)
    assert log == [
        (TRIM, 0, 0, SIZE),
        (ZEROES, FAST_ZERO, 0, SIZE),
        (ZEROES, FUA | NO_HOLE, GIB, 5 * GIB),
        (STATUS, REQ_ONE, 0, SIZE),
        (WRITE, FUA | PAYLOAD_LEN, GIB, 512),
        (READ, 0, GIB, 200_192),
        (DISC, 0, 0, 0),
    ]


def test_requests_of_32_bits_are_cut(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    """By the server's largest payload, where its preferred blocks end."""
    log: Log = []

    def serve(client: Client) -> None:
        infos = struct.pack(">HIII", 3, 512, 4096, 10_240)
        client.negotiate(size=SIZE, flags=FLAGS, infos=infos)
        while True:
            bits, command, cookie, offset, length = client.request()
            log.append((command, bits, offset, length))
            if command == DISC:
                return
            data = bytes(length) if command == READ else b""
            if command == WRITE:
                client.receive(length)
            client.send(struct.pack(">II", 0x67446698, 0) + cookie + data)

    with opened(ctx, opener, tmp_path / "s", serve) as node:
        ctx.run(node.preadv(1024, memoryview(bytearray(20_480))))
        ctx.run(node.pwritev(1024, memoryview(bytes(20_480)), RequestFlags.FUA))
        ctx.run(node.pwrite_zeroes(1024, 20_480))
        ctx.run(node.pdiscard(0, SIZE))
    cut = [(1024, 7168), (8192, 8192), (16384, 5120)]
    assert log == [
        *((READ, 0, *piece) for piece in cut),
        *((WRITE, FUA, *piece) for piece in cut),
        *((ZEROES, NO_HOLE, *piece) for piece in cut),
        *((TRIM, 0, at, GIB) for at in range(0, SIZE, GIB)),
        (DISC, 0, 0, 0),
    ]


def test_after_one_piece_fails_no_more_are_begun(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    log: Log = []

    def serve(client: Client) -> None:
        client.negotiate(size=SIZE, flags=FLAGS)
        while True:
            bits, command, cookie, offset, length = client.request()
            log.append((command, bits, offset, length))
            client.send(struct.pack(">II", 0x67446698, 28) + cookie)

    with (
        opened(ctx, opener, tmp_path / "s", serve) as node,
        pytest.raises(OSError, match="No space left"),
    ):
        ctx.run(node.pwrite_zeroes(0, SIZE))
    assert len([1 for command, *_ in log if command == ZEROES]) == 8


@given(
    st.integers(0, 1 << 40),
    st.integers(1, 1 << 24),
    st.integers(0, 8),
    st.integers(9, 20),
    st.integers(1, 1 << 12),
)
def test_pieces_are_whole_blocks_and_all_of_it(
    offset: int, length: int, minimum_bits: int, preferred_bits: int, blocks_max: int
) -> None:
    minimum, preferred = 1 << minimum_bits, 1 << preferred_bits
    offset, length = offset * minimum, min(length, 4096 * blocks_max) * minimum
    bytes_max = blocks_max * minimum
    at = offset
    for start, size in split(offset, length, bytes_max, preferred=preferred):
        assert start == at
        assert 0 < size <= bytes_max
        assert not size % minimum
        at += size
        assert at == offset + length or not at % preferred or bytes_max < 2 * preferred
    assert at == offset + length
