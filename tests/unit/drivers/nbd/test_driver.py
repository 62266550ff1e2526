# SPDX-License-Identifier: Apache-2.0
"""The driver with servers of several minds: what it asks of them, and what of a lost one."""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.protocol import Reply
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Cancelled, run_in_context
from blockemu.loop.iothread import IOThread
from blockemu.loop.sync import gather, yield_now
from tests.peers.nbdkit import NbdKit
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuNbd
from tests.peers.requirement import require_peer
from tests.peers.scripted_nbd import SIZE, Client, ScriptedNbd

KIB = 1024
READ_WRITE = 0x65
"""HAS_FLAGS, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES: no FUA."""


@contextmanager
def opened(
    ctx: AioContext, opener: Opener, path: Path, **options: Any
) -> Iterator[BlockDriverState]:
    server = {"type": "unix", "path": str(path)}
    node = ctx.run(opener.open({"driver": "nbd", "server": server, **options}))
    try:
        yield node
    finally:
        ctx.run(node.close())


def read(ctx: AioContext, node: BlockDriverState, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    ctx.run(node.preadv(offset, view))
    return bytes(view)


def good(log: list[tuple[int, int, int, int]], *, flags: int = READ_WRITE, size: int = SIZE) -> Any:
    """A server of zeroes with simple replies that writes down (command, flags, offset, length)."""

    def serve(client: Client) -> None:
        client.negotiate(flags=flags, size=size)
        while True:
            bits, command, cookie, offset, length = client.request()
            log.append((command, bits, offset, length))
            if command == 2:
                return
            if command == 1:
                client.receive(length)
            data = bytes(length) if command == 0 else b""
            client.send(struct.pack(">II", 0x67446698, 0) + cookie + data)

    return serve


def test_requests_are_what_was_asked_for(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    """FUA is a flush where the server has none; DISC comes last."""
    log: list[tuple[int, int, int, int]] = []
    with ScriptedNbd(tmp_path / "s", good(log)), opened(ctx, opener, tmp_path / "s") as node:
        view = memoryview(bytes(KIB))
        ctx.run(node.pwritev(512, view, RequestFlags.FUA))
        ctx.run(node.pwrite_zeroes(0, 512))
        ctx.run(node.pwrite_zeroes(0, 512, RequestFlags.MAY_UNMAP))
        ctx.run(node.pdiscard(100, 2000))
        ctx.run(node.preadv(1, memoryview(bytearray(2))))
        with pytest.raises(OSError, match="can't say if zeroes are fast"):
            ctx.run(node.pwrite_zeroes(0, 512, RequestFlags.NO_FALLBACK))
    assert log == [
        (1, 0, 512, KIB), (3, 0, 0, 0), (6, 2, 0, 512), (6, 0, 0, 512), (4, 0, 512, 1536),
        (0, 0, 0, 512), (2, 0, 0, 0),
    ]  # fmt: skip


def test_fua_is_fua_where_the_server_has_it(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    log: list[tuple[int, int, int, int]] = []
    serve = good(log, flags=READ_WRITE | 8)
    with ScriptedNbd(tmp_path / "s", serve), opened(ctx, opener, tmp_path / "s") as node:
        ctx.run(node.pwritev(0, memoryview(bytes(512)), RequestFlags.FUA))
    assert log == [(1, 1, 0, 512), (2, 0, 0, 0)]


def test_what_the_server_cant_isnt_asked(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    """Zeroes are written, discards and flushes forgotten, status is data."""
    log: list[tuple[int, int, int, int]] = []
    serve = good(log, flags=1)
    with ScriptedNbd(tmp_path / "s", serve), opened(ctx, opener, tmp_path / "s") as node:
        ctx.run(node.pwrite_zeroes(0, 512))
        ctx.run(node.pdiscard(0, 512))
        ctx.run(node.flush())
        status = ctx.run(node.block_status(0, SIZE))
        assert (status.length, status.data, status.zero) == (SIZE, True, False)
    assert log == [(1, 0, 0, 512), (2, 0, 0, 0)]


def test_read_only_export_isnt_opened_for_writing(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    with ScriptedNbd(tmp_path / "s", good([], flags=3)):
        with (
            pytest.raises(ImageError, match="lets nobody write to this export"),
            opened(ctx, opener, tmp_path / "s"),
        ):
            pass
        with opened(ctx, opener, tmp_path / "s", **{"read-only": True}) as node:
            assert read(ctx, node, 0, 512) == bytes(512)


def test_bytes_past_the_end(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    with ScriptedNbd(tmp_path / "s", good([])), opened(ctx, opener, tmp_path / "s") as node:
        assert read(ctx, node, SIZE - 512, 4096) == bytes(4096)
        for call in (
            node.pwritev(SIZE, memoryview(bytes(512))),
            node.pwrite_zeroes(SIZE - 512, KIB),
        ):
            with pytest.raises(OSError, match=f"ends at {SIZE}") as caught:
                ctx.run(call)
            assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="Operation not supported"):
            ctx.run(node.truncate(2 * SIZE))


def test_unknown_options_and_bad_ones_are_refused(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    with ScriptedNbd(tmp_path / "s", good([])):
        for options in ({"tls": "x"}, {"open-timeout": -1}, {"reconnect-delay": "soon"}):
            with (
                pytest.raises(ImageError, match=next(iter(options))),
                opened(ctx, opener, tmp_path / "s", **options),
            ):
                pass


def test_cancelled_request_gives_its_memory_back_at_once(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """The server answers half of a read, then no more; whoever waits leaves all the same, the late
    data goes nowhere, and the connection is of use still."""
    log: list[int] = []

    def serve(client: Client) -> None:
        client.negotiate()
        cookie, length = client.request()[2], 0
        client.send(struct.pack(">II", 0x67446698, 0) + cookie + b"a" * 100_000)
        _, _, second, _, length = client.request()
        client.send(b"a" * 100_000)
        client.send(struct.pack(">II", 0x67446698, 0) + second + b"b" * length)
        log.append(length)
        client.request()

    with ScriptedNbd(tmp_path / "s", serve), opened(ctx, opener, tmp_path / "s") as node:
        memory = bytearray(200_192)
        task = ctx.spawn(node.preadv(0, memoryview(memory)[:199_680]))
        while not memory[1000]:
            ctx.poll(blocking=True)
        task.cancel()
        while not task.done():
            ctx.poll(blocking=True)
        assert isinstance(task.exception(), Cancelled)
        memory[:] = bytes(len(memory))
        # The first read was of 199680 bytes; the server's 200000 are 320 too many for it.
        with pytest.raises(OSError, match="bad magic number"):
            read(ctx, node, 0, 512)
        assert not any(memory)


def test_cancelled_write_leaves_whole(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    """A payload that is half sent goes on as it was, whatever its memory is used for."""
    started: list[bytes] = []
    begin = socket.socketpair()

    def serve(client: Client) -> None:
        client.negotiate()
        for _ in range(2):
            if not started:
                begin[1].recv(1)
            _, command, cookie, _, length = client.request()
            if command == 1:
                started.append(client.receive(length))
            data = b"" if command == 1 else bytes(length)
            client.send(struct.pack(">II", 0x67446698, 0) + cookie + data)
        client.request()

    size = 32 << 20

    def big(client: Client) -> None:
        negotiate = client.negotiate
        client.negotiate = lambda: negotiate(size=size)  # type: ignore[method-assign,assignment]
        serve(client)

    with (
        begin[0],
        begin[1],
        ScriptedNbd(tmp_path / "s", big),
        opened(ctx, opener, tmp_path / "s") as node,
    ):
        memory = bytearray(b"w" * size)
        task = ctx.spawn(node.pwritev(0, memoryview(memory)))
        ctx.poll(blocking=False)
        task.cancel()
        while not task.done():
            ctx.poll(blocking=True)
        memory[:] = bytes(size)
        begin[0].send(b"x")
        assert read(ctx, node, 0, 512) == bytes(512)
    assert started[0] == b"w" * size


# --- a lost connection ---


def test_lost_connection_fails_requests_at_once_without_a_delay(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    def serve(client: Client) -> None:
        client.negotiate()
        client.request()

    with ScriptedNbd(tmp_path / "s", serve), opened(ctx, opener, tmp_path / "s") as node:
        with pytest.raises(OSError, match="the server hung up") as caught:
            read(ctx, node, 0, 512)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="the server hung up, and no new connection"):
            read(ctx, node, 0, 512)


def test_requests_in_flight_are_made_again(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    """The first two connections end in the middle of a request."""
    log: list[tuple[int, int, int, int]] = []
    whole = good(log)

    def serve(client: Client) -> None:
        if server.clients <= 2:
            client.negotiate()
            _, _, cookie, _, _ = client.request()
            client.send(struct.pack(">II", 0x67446698, 0) + cookie + b"junk")
        else:
            whole(client)

    with ScriptedNbd(tmp_path / "s", serve) as server:
        options = {"reconnect-delay": 20}
        with opened(ctx, opener, tmp_path / "s", **options) as node:
            assert read(ctx, node, 512, 4096) == bytes(4096)
            ctx.run(node.flush())
        assert server.clients == 3
    assert log == [(0, 0, 512, 4096), (3, 0, 0, 0), (2, 0, 0, 0)]


def block_sizes(minimum: int, maximum: int) -> bytes:
    return struct.pack(">HIII", 3, minimum, 4096, maximum)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "smaller": ({}, {"size": SIZE // 2}, f"has {SIZE // 2} bytes now, and had {SIZE}"),
    "read-only": ({}, {"flags": 0x67}, "lets nobody write to this export"),
    "blocks": ({}, {"infos": block_sizes(4096, 1 << 25)}, "block sizes are others than before"),
    "payload": ({}, {"infos": block_sizes(512, 1 << 16)}, "block sizes are others than before"),
    "no-flush": ({}, {"flags": 0x61}, "has no flush any more"),
    "no-status": ({"structured": True}, {}, "doesn't tell block status any more"),
    "tls": ({}, {"refusal": Reply.NBD_REP_ERR_TLS_REQD}, "wants TLS"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_export_that_has_changed_is_given_up(
    ctx: AioContext, opener: Opener, tmp_path: Path, change: str
) -> None:
    before, after, reason = CHANGES[change]

    def serve(client: Client) -> None:
        client.negotiate(**(before if server.clients == 1 else after))
        client.request()

    options = {"reconnect-delay": 3600}
    with (
        ScriptedNbd(tmp_path / "s", serve) as server,
        opened(ctx, opener, tmp_path / "s", **options) as node,
    ):
        for _ in range(2):
            with pytest.raises(OSError, match=reason):
                read(ctx, node, 0, 512)
        assert server.clients == 2


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (
            Reply.NBD_REP_ERR_UNKNOWN,
            "hung up, and no new connection: the server has no such export",
        ),
        (Reply.NBD_REP_ERR_SHUTDOWN, "and no new connection: the server is shutting down"),
    ],
)
def test_an_export_that_is_gone_may_come_back(
    ctx: AioContext, opener: Opener, tmp_path: Path, refusal: Reply, reason: str
) -> None:
    """Requests wait for it as long as for a server that is gone; it is asked again and again."""

    def serve(client: Client) -> None:
        if server.clients == 1:
            client.negotiate()
            client.request()
        elif server.clients < 5:
            client.negotiate(refusal=refusal)
        else:
            good([])(client)

    with (
        ScriptedNbd(tmp_path / "s", serve) as server,
        opened(ctx, opener, tmp_path / "s", **{"reconnect-delay": 1}) as node,
    ):
        link = node.driver._link  # type: ignore[attr-defined]
        link._reconnect_delay_ns = 150_000_000  # the first attempt comes after 100 ms
        with pytest.raises(OSError, match=reason):
            read(ctx, node, 0, 512)
        while not link.connections:
            ctx.poll(blocking=True)
        assert read(ctx, node, 0, 512) == bytes(512)
        assert server.clients == 5


def test_opening_waits_for_an_export_too(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    def serve(client: Client) -> None:
        if server.clients < 3:
            client.negotiate(refusal=Reply.NBD_REP_ERR_UNKNOWN)
        else:
            good([])(client)

    with ScriptedNbd(tmp_path / "s", serve) as server:
        with opened(ctx, opener, tmp_path / "s", **{"open-timeout": 30}) as node:
            assert read(ctx, node, 0, 512) == bytes(512)
        assert server.clients == 3


def test_an_export_that_has_grown_is_taken_as_it_is(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    log: list[tuple[int, int, int, int]] = []

    def serve(client: Client) -> None:
        if server.clients == 1:
            client.negotiate()
            client.request()
        else:
            good(log, size=2 * SIZE)(client)

    with (
        ScriptedNbd(tmp_path / "s", serve) as server,
        opened(ctx, opener, tmp_path / "s", **{"reconnect-delay": 3600}) as node,
    ):
        assert node.length_bytes == SIZE
        assert read(ctx, node, 0, 512) == bytes(512)
        assert node.length_bytes == 2 * SIZE
        assert read(ctx, node, 2 * SIZE - 512, 512) == bytes(512)
    assert log == [(0, 0, 0, 512), (0, 0, 2 * SIZE - 512, 512), (2, 0, 0, 0)]


def test_truncating_to_more_asks_the_server_anew(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """What was resized above us is taken; the old connection is left."""
    log: list[tuple[int, int, int, int]] = []

    def serve(client: Client) -> None:
        good(log, size=SIZE if server.clients < 3 else 2 * SIZE)(client)

    with (
        ScriptedNbd(tmp_path / "s", serve) as server,
        opened(ctx, opener, tmp_path / "s") as node,
    ):
        with pytest.raises(OSError, match=f"has {SIZE} bytes"):
            ctx.run(node.truncate(2 * SIZE))
        assert node.length_bytes == SIZE
        ctx.run(node.truncate(2 * SIZE))
        assert node.length_bytes == 2 * SIZE
        ctx.run(node.pwritev(2 * SIZE - 512, memoryview(bytes(512))))
    assert log.count((2, 0, 0, 0)) == server.clients == 3
    assert (1, 0, 2 * SIZE - 512, 512) in log


def test_a_server_that_breaks_the_rules_gets_no_second_chance(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    def serve(client: Client) -> None:
        client.negotiate()
        client.request()
        client.send(b"x" * 16)

    with ScriptedNbd(tmp_path / "s", serve) as server:
        with opened(ctx, opener, tmp_path / "s", **{"reconnect-delay": 3600}) as node:
            for _ in range(2):
                with pytest.raises(OSError, match="bad magic number"):
                    read(ctx, node, 0, 512)
        assert server.clients == 1


def test_requests_wait_for_the_delay_and_then_fail(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """The path is gone for good; after one second it is an EIO that says why."""

    def serve(client: Client) -> None:
        client.negotiate()
        client.request()
        (tmp_path / "s").unlink()

    options = {"reconnect-delay": 1}
    with (
        ScriptedNbd(tmp_path / "s", serve),
        opened(ctx, opener, tmp_path / "s", **options) as node,
    ):
        begin_ns = ctx.now_ns()
        with pytest.raises(OSError, match="hung up, and no new connection"):
            read(ctx, node, 0, 512)
        assert 1e9 <= ctx.now_ns() - begin_ns < 10e9


def test_a_node_that_is_given_up_takes_no_new_connection(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """The second server comes back while the node has been told to wait for nobody."""

    def serve(client: Client) -> None:
        if server.clients == 2:
            ctx.schedule_oneshot(lambda: node.driver.cancel_in_flight("interrupted"))
        client.negotiate()
        client.request()

    options = {"reconnect-delay": 3600}
    with (
        ScriptedNbd(tmp_path / "s", serve) as server,
        opened(ctx, opener, tmp_path / "s", **options) as node,
    ):
        with pytest.raises(OSError, match="interrupted"):
            read(ctx, node, 0, 512)
        with pytest.raises(OSError, match="interrupted"):
            read(ctx, node, 0, 512)


def test_opening_tries_for_its_timeout(ctx: AioContext, opener: Opener, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ExitStack() as servers:

        def start() -> None:
            servers.enter_context(ScriptedNbd(path, good([])))

        timer = ctx.new_timer(start)
        timer.arm(ctx.now_ns() + 50_000_000)
        with opened(ctx, opener, path, **{"open-timeout": 30}) as node:
            assert read(ctx, node, 0, 512) == bytes(512)


@pytest.mark.parametrize("seed", range(2))
def test_no_flushed_write_is_lost_when_the_server_is_killed(
    ctx: AioContext, opener: Opener, tmp_path: Path, seed: int
) -> None:
    """qemu-nbd is killed and started again, five times, while a load that knows what it wrote goes
    on in another thread."""
    require_peer("qemu-nbd")
    rng, disk, path = random.Random(seed), tmp_path / "disk", tmp_path / "s"
    disk.write_bytes(bytes(SIZE))
    model = bytearray(SIZE)
    rounds, stop = 0, False

    async def write(block: int) -> None:
        data = rng.randbytes(512)
        start = block * 512
        await backend.pwritev(start, memoryview(data))
        model[start : start + 512] = data

    async def load() -> None:
        nonlocal rounds
        while not stop:
            await gather(*(write(block) for block in rng.sample(range(SIZE // 512), 16)))
            await backend.flush()
            view = memoryview(bytearray(64 * KIB))
            offset = rng.randrange(SIZE - len(view))
            await backend.preadv(offset, view)
            assert view == model[offset : offset + len(view)]
            rounds += 1
            await yield_now()

    async def more_rounds(count: int) -> None:
        end = rounds + count
        while rounds < end and not task.done():
            await yield_now()

    thread = IOThread("load")
    thread.start()
    server: ServerProcess = QemuNbd(disk, fmt="raw", socket_path=path).start()
    try:
        options = {"driver": "nbd", "path": str(path), "reconnect-delay": 60}
        backend = BlockBackend("disk", ctx.run(opener.open(options)), writable=True)
        ctx.run(backend.move_to(thread.ctx))
        task = ctx.spawn(run_in_context(thread.ctx, load))
        for _ in range(5):
            ctx.run(run_in_context(thread.ctx, lambda: more_rounds(rng.randrange(1, 5))))
            server.discard()
            server = QemuNbd(disk, fmt="raw", socket_path=path).start()
        ctx.run(run_in_context(thread.ctx, lambda: more_rounds(3)))
        stop = True
        while not task.done():
            ctx.poll(blocking=True)
        task.result()
        ctx.run(backend.move_to(ctx))
        assert read(ctx, backend.node, 0, SIZE) == model
        ctx.run(backend.close())
    finally:
        thread.stop()
        server.discard()
    assert disk.read_bytes() == model


# --- servers of other kinds ---


@pytest.mark.parametrize("mask", ["--mask-handshake=0", "--mask-handshake=1", "--no-sr"])
def test_old_handshakes_are_spoken(
    ctx: AioContext, opener: Opener, tmp_path: Path, mask: str
) -> None:
    """Not fixed newstyle: EXPORT_NAME only; without NO_ZEROES; without structured replies."""
    require_peer("nbdkit")
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * 70_000 + bytes(442))
    server = NbdKit(disk, socket_path=tmp_path / "s")
    server.command.insert(1, mask)
    with server, opened(ctx, opener, tmp_path / "s") as node:
        assert node.length_bytes == 70_442
        assert read(ctx, node, 0, 70_442) == disk.read_bytes()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_tcp_is_spoken(ctx: AioContext, opener: Opener, host: str) -> None:
    """IPv4 and IPv6; through TCP a server is a thread here, too."""
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    listener = socket.socket(family)
    listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    listener.listen()
    with ScriptedNbd(listener, good([])):
        options = {"driver": "nbd", "host": host, "port": str(listener.getsockname()[1])}
        node = ctx.run(opener.open(options))
        assert read(ctx, node, 0, 512) == bytes(512)
        ctx.run(node.close())


def test_a_closed_port_is_one_line(ctx: AioContext, opener: Opener) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        uri = f"nbd://127.0.0.1:{port}/x"
        with pytest.raises(ImageError) as caught:
            ctx.run(opener.open_image(uri, fmt=None, read_only=True, direct=False, aio="native"))
    assert str(caught.value) == f"{uri}: connecting to 127.0.0.1:{port} failed: Connection refused"


def test_a_socket_that_was_handed_over_is_spoken_on_once(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    """`server.type=fd`; lost, there is no other."""

    def serve(client: Client) -> None:
        client.negotiate()
        _, _, cookie, _, length = client.request()
        client.send(struct.pack(">II", 0x67446698, 0) + cookie + bytes(length))

    with ScriptedNbd(tmp_path / "s", serve), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "s"))
        server = {"type": "fd", "str": str(sock.fileno())}
        options = {"driver": "nbd", "server": server, "reconnect-delay": 3600}
        node = ctx.run(opener.open(options))
        assert read(ctx, node, 0, 512) == bytes(512)
        with pytest.raises(OSError, match="used up, and there is no other"):
            read(ctx, node, 0, 512)
        ctx.run(node.close())
