# SPDX-License-Identifier: Apache-2.0
"""Several connections to one export: how requests are spread, and what of one that breaks."""

from __future__ import annotations

import errno
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.nbd.driver import NbdDriver
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Cancelled, run_in_context
from blockemu.loop.iothread import IOThread
from blockemu.loop.sync import gather
from tests.peers.nbdkit import NbdKit
from tests.peers.requirement import require_peer
from tests.peers.scripted_nbd import SIZE, Client, ScriptedNbd

MULTI = 0x165
"""HAS_FLAGS, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN."""

READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
BLOCK = 512


class Server:
    """Answers with zeroes, and counts (client, command). `break_at` says of a request, by client
    and command, that the connection ends in its place. Nobody is answered while `hold` is set."""

    def __init__(self, path: Path, *, flags: int = MULTI) -> None:
        self.flags = flags
        self.counts: Counter[tuple[int, int]] = Counter()
        self.break_at: Callable[[int, int], bool] = lambda client, command: False
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()
        self._next = 0
        self.scripted = ScriptedNbd(path, self._serve)

    def _serve(self, client: Client) -> None:
        with self._lock:
            number = self._next
            self._next += 1
        client.negotiate(flags=self.flags)
        while True:
            _, command, cookie, _, length = client.request()
            data = client.receive(length) if command == WRITE else b""
            assert not any(data)
            self.counts[number, command] += 1
            if command == DISC or self.break_at(number, command):
                return
            assert self.go_on.wait(30)
            data = bytes(length) if command == READ else b""
            client.send(struct.pack(">II", 0x67446698, 0) + cookie + data)

    def of(self, command: int) -> list[int]:
        """How many of these requests each client made."""
        return [self.counts[number, command] for number in range(self._next)]


@contextmanager
def opened(
    ctx: AioContext, opener: Opener, path: Path, count: int, **options: Any
) -> Iterator[BlockDriverState]:
    """With all connections there."""
    server = {"type": "unix", "path": str(path)}
    options = {"driver": "nbd", "server": server, "multi-conn": count, **options}
    node = ctx.run(opener.open(options))
    try:
        until(ctx, lambda: connections(node) == count)
        yield node
    finally:
        ctx.run(node.close())


def connections(node: BlockDriverState) -> int:
    assert isinstance(node.driver, NbdDriver)
    return node.driver._link.connections


def until(ctx: AioContext, condition: Callable[[], bool]) -> None:
    while not condition():
        ctx.poll(blocking=True)


async def read(node: BlockDriverState, block: int) -> None:
    await node.preadv(block * BLOCK, memoryview(bytearray(BLOCK)))


async def write(node: BlockDriverState, block: int) -> None:
    await node.pwritev(block * BLOCK, memoryview(bytes(BLOCK)))


def test_requests_are_spread_and_one_flush_covers_all(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    server = Server(tmp_path / "s")
    with server.scripted, opened(ctx, opener, tmp_path / "s", 4) as node:
        server.go_on.clear()
        reads = [ctx.spawn(read(node, block)) for block in range(64)]
        server.go_on.set()
        until(ctx, lambda: all(task.done() for task in reads))
        ctx.run(node.flush())
        assert server.of(READ) == [16] * 4
        assert sum(server.of(FLUSH)) == 1
    assert server.of(DISC) == [1] * 4


def test_a_server_that_does_not_say_so_gets_one_connection(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    server = Server(tmp_path / "s", flags=0x65)
    path = {"type": "unix", "path": str(tmp_path / "s")}
    with server.scripted:
        node = ctx.run(opener.open({"driver": "nbd", "server": path, "multi-conn": 4}))

        async def some() -> None:
            await gather(*(read(node, block) for block in range(16)))

        ctx.run(some())
        ctx.run(node.close())
    assert server.of(READ) == [16]


def test_one_that_breaks_is_replaced_and_fails_only_its_writes(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """Without a delay: reads are made elsewhere; a write that the server may still carry out is
    an error."""
    server = Server(tmp_path / "s")
    with server.scripted, opened(ctx, opener, tmp_path / "s", 3) as node:
        server.break_at = lambda client, _: client == 1
        tasks = [ctx.spawn(read(node, block)) for block in range(30)]
        until(ctx, lambda: all(task.done() for task in tasks))
        for task in tasks:
            task.result()
        until(ctx, lambda: connections(node) == 3)
        assert server.scripted.clients == 4

        server.break_at = lambda client, _: client == 2
        tasks = [ctx.spawn(write(node, block)) for block in range(30)]
        until(ctx, lambda: all(task.done() for task in tasks))
        errors = [error for task in tasks if (error := task.exception()) is not None]
        assert len(errors) == 10
        assert all(isinstance(error, OSError) and error.errno == errno.EIO for error in errors)
        until(ctx, lambda: connections(node) == 3)


def test_with_a_delay_nothing_fails_when_one_breaks(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    server = Server(tmp_path / "s")
    options = {"reconnect-delay": 3600}
    with server.scripted, opened(ctx, opener, tmp_path / "s", 3, **options) as node:
        server.break_at = lambda client, _: client in (0, 2)

        async def some() -> None:
            await gather(*(write(node, block) for block in range(60)))

        ctx.run(some())


def test_all_come_back_after_a_restart(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    server = Server(tmp_path / "s")
    options = {"reconnect-delay": 3600}
    with server.scripted, opened(ctx, opener, tmp_path / "s", 3, **options) as node:
        server.break_at = lambda client, _: client < 3

        async def some() -> None:
            await gather(*(write(node, block) for block in range(60)))

        ctx.run(some())
        until(ctx, lambda: connections(node) == 3)
        assert server.scripted.clients == 6


def test_a_server_that_takes_it_back_is_left_with_one(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """After a restart, a flush no longer covers all connections: there is one, then."""
    server = Server(tmp_path / "s")
    options = {"reconnect-delay": 3600}
    with server.scripted, opened(ctx, opener, tmp_path / "s", 3, **options) as node:
        server.flags = 0x65
        server.break_at = lambda client, _: client < 3

        async def some() -> None:
            await gather(*(write(node, block) for block in range(60)))

        ctx.run(some())
        assert connections(node) == 1
        ctx.run(node.flush())
    # The others were asked, and hung up on when they no longer would do.
    assert len([count for count in server.of(WRITE)[3:] if count]) == 1


def test_a_server_that_takes_only_two_serves_by_two(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """The third is hung up on; that is tried again, later, and hurts nobody."""
    server = Server(tmp_path / "s")
    whole = server.scripted._serve

    def serve(client: Client) -> None:
        if server.scripted.clients <= 2:
            whole(client)

    server.scripted._serve = serve
    path = {"type": "unix", "path": str(tmp_path / "s")}
    with server.scripted:
        node = ctx.run(opener.open({"driver": "nbd", "server": path, "multi-conn": 8}))
        until(ctx, lambda: server.scripted.clients >= 3)

        async def some() -> None:
            await gather(*(write(node, block) for block in range(32)))

        ctx.run(some())
        assert connections(node) == 2
        ctx.run(node.close())


def test_a_node_moves_with_its_connections_and_with_what_was_given_up(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """A write that nobody waits for any more is still under way when the node changes threads."""
    server = Server(tmp_path / "s")
    thread = IOThread("other")
    thread.start()
    try:
        with server.scripted, opened(ctx, opener, tmp_path / "s", 2) as node:
            backend = BlockBackend("disk", node, writable=True)
            server.go_on.clear()
            tasks = [ctx.spawn(write(node, block)) for block in range(4)]
            for task in tasks:
                task.cancel()
            until(ctx, lambda: all(task.done() for task in tasks))
            assert all(isinstance(task.exception(), Cancelled) for task in tasks)
            ctx.run(backend.move_to(thread.ctx))
            server.go_on.set()

            async def some() -> None:
                await gather(*(read(node, block) for block in range(8)))

            ctx.run(run_in_context(thread.ctx, some))
            ctx.run(backend.move_to(ctx))
            node.remove_parent(backend.root)
            assert sum(server.of(WRITE)) == 4
            assert sum(server.of(READ)) == 8
    finally:
        thread.stop()


@pytest.mark.parametrize("count", [2, 4])
def test_a_real_server_has_what_was_written_through_all(
    ctx: AioContext, opener: Opener, tmp_path: Path, count: int
) -> None:
    require_peer("nbdkit")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    expected = b"".join(bytes([block % 251]) * BLOCK for block in range(SIZE // BLOCK))
    with (
        NbdKit(disk, socket_path=tmp_path / "s"),
        opened(ctx, opener, tmp_path / "s", count) as node,
    ):

        async def fill() -> None:
            view = memoryview(expected)
            await gather(*(node.pwritev(at, view[at : at + BLOCK]) for at in range(0, SIZE, BLOCK)))
            await node.flush()

        ctx.run(fill())
        assert disk.read_bytes() == expected
