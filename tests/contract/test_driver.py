# SPDX-License-Identifier: Apache-2.0
"""What every driver that stores data promises, through its node, whatever is below it.

Each case is a device of 1 MiB and a bit, which starts as known bytes. The tests keep a bytearray
beside it and compare. What a direct map hands out is checked against what the node reads.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.drivers.status_runs import StatusRuns, state_of
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import PosixFiles
from blockemu.loop.iothread import IOThread
from blockemu.loop.sync import gather
from tests.peers.nbdkit import NbdKit
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuImg, QemuNbd
from tests.peers.requirement import require_peer

SIZE = (1 << 20) + 512
Options = dict[str, Any]


def pattern(size: int) -> bytes:
    """Bytes that differ from block to block, so that a block in the wrong place shows."""
    return random.Random(size).randbytes(size)


def _file(path: Path, *, direct: bool = False, aio: str = "native") -> Options:
    return {"driver": "file", "filename": str(path), "cache": {"direct": direct}, "aio": aio}


def _plain(folder: Path, **how: Any) -> Options:
    path = folder / "disk.raw"
    path.write_bytes(pattern(SIZE))
    return _file(path, **how)


def _raw_window(folder: Path) -> Options:
    path = folder / "disk.raw"
    path.write_bytes(b"before" + pattern(SIZE) + b"after")
    return {"driver": "raw", "file": _file(path), "offset": 6, "size": SIZE}


def _qcow2(folder: Path, *, direct: bool = False, backed: bool = False, **options: Any) -> Options:
    require_peer("qemu-img")
    content = folder / "content.raw"
    content.write_bytes(pattern(SIZE))
    path = folder / "disk.qcow2"
    if backed:
        QemuImg.create(path, None, options=options, backing=content, backing_fmt="raw")
    else:
        QemuImg.create(path, SIZE, options=options)
        QemuImg.convert(content, path, source_fmt="raw", target_fmt="qcow2", existing=True)
    return {"driver": "qcow2", "file": _file(path, direct=direct)}


def _detecting(options: Options, mode: str) -> Options:
    return {**options, "detect-zeroes": mode}


CASES: dict[str, Callable[[Path], Options]] = {
    "file": _plain,
    "file-direct": lambda folder: _plain(folder, direct=True),
    "file-direct-threads": lambda folder: _plain(folder, direct=True, aio="threads"),
    "raw": lambda folder: {"driver": "raw", "file": _plain(folder)},
    "raw-direct": lambda folder: {"driver": "raw", "file": _plain(folder, direct=True)},
    "raw-window": _raw_window,
    "qcow2": _qcow2,
    "qcow2-direct": lambda folder: _qcow2(folder, direct=True),
    "qcow2-v2": lambda folder: _qcow2(folder, compat="0.10"),
    "qcow2-512": lambda folder: _qcow2(folder, cluster_size=512),
    "qcow2-512-direct": lambda folder: _qcow2(folder, direct=True, cluster_size=512),
    "qcow2-2M": lambda folder: _qcow2(folder, cluster_size="2M"),
    "qcow2-subclusters": lambda folder: _qcow2(folder, backed=True, extended_l2="on"),
    "qcow2-backed": lambda folder: _qcow2(folder, backed=True),
    "qcow2-backed-4k": lambda folder: _qcow2(folder, backed=True, cluster_size=4096),
    "qcow2-v2-backed": lambda folder: _qcow2(folder, backed=True, compat="0.10"),
    "file-direct-detect": lambda folder: _detecting(_plain(folder, direct=True), "unmap"),
    "raw-window-detect": lambda folder: _detecting(_raw_window(folder), "on"),
    "qcow2-detect": lambda folder: _detecting(_qcow2(folder), "unmap"),
    "qcow2-v2-backed-detect": lambda folder: _detecting(
        _qcow2(folder, backed=True, compat="0.10"), "on"
    ),
}


def _nbd(server: ServerProcess, **options: Any) -> Options:
    address = {"type": "unix", "path": str(server.socket_path)}
    return {"driver": "nbd", "server": address, "export": server.export, **options}


def _qemu_nbd(folder: Path, servers: ExitStack) -> Options:
    require_peer("qemu-nbd")
    _plain(folder)
    path = folder / "disk.raw"
    server = QemuNbd(path, fmt="raw", socket_path=folder / "nbd", export="disk")
    return _nbd(servers.enter_context(server))


def _nbdkit(folder: Path, servers: ExitStack, *filters: str, **parameters: str) -> Options:
    require_peer("nbdkit")
    _plain(folder)
    server = NbdKit(
        folder / "disk.raw",
        socket_path=folder / "nbd",
        filters=filters,
        extra=[f"{key.replace('_', '-')}={value}" for key, value in parameters.items()],
    )
    return _nbd(servers.enter_context(server))


SERVED: dict[str, Callable[[Path, ExitStack], Options]] = {
    "nbd-qemu": _qemu_nbd,
    "nbd-kit": _nbdkit,
    "nbd-kit-blocks": lambda folder, servers: _nbdkit(
        folder, servers, "blocksize-policy", blocksize_error_policy="error",
        blocksize_minimum="512", blocksize_preferred="4096", blocksize_maximum="8192",
    ),
    "nbd-kit-bare": lambda folder, servers: _nbdkit(
        folder, servers, "nozero", "noextents", zeromode="none",
    ),
    "raw-nbd": lambda folder, servers: {"driver": "raw", "file": _qemu_nbd(folder, servers)},
}  # fmt: skip
"""Those that need a server."""


@dataclass
class Device:
    """A node and the bytes that it should hold."""

    ctx: AioContext
    options: Options
    opener: Opener
    node: BlockDriverState
    model: bytearray = field(default_factory=lambda: bytearray(pattern(SIZE)))

    async def read(self, offset: int, length: int) -> bytes:
        target = bytearray(b"\xa5" * length)
        await self.node.preadv(offset, memoryview(target))
        return bytes(target)

    async def write(
        self, offset: int, data: bytes, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        await self.node.pwritev(offset, memoryview(data), flags)
        self.model[offset : offset + len(data)] = data

    async def zero(self, offset: int, length: int, flags: RequestFlags) -> None:
        await self.node.pwrite_zeroes(offset, length, flags)
        self.model[offset : offset + length] = bytes(length)

    def check(self) -> None:
        """The device holds what the model holds, by whatever sizes it is read."""
        assert self.ctx.run(self.read(0, SIZE)) == self.model
        assert self.ctx.run(self.read(12345, 4321)) == self.model[12345 : 12345 + 4321]

    def reopen(self) -> None:
        """Close and open again: what was written is there."""
        self.ctx.run(self.node.flush())
        self.ctx.run(self.node.close())
        self.node = self.ctx.run(self.opener.open(self.options))


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    context = AioContext("test")
    context.adopt()
    yield context
    context.close()


@pytest.fixture(params=[*CASES, *SERVED])
def device(request: pytest.FixtureRequest, ctx: AioContext, tmp_path: Path) -> Iterator[Device]:
    with ExitStack() as servers:
        if request.param in SERVED:
            options = SERVED[request.param](tmp_path, servers)
        else:
            options = CASES[request.param](tmp_path)
        yield from _opened(ctx, options, tmp_path)


def _opened(ctx: AioContext, options: Options, folder: Path) -> Iterator[Device]:
    opener = Opener(files=PosixFiles(), ctx=ctx)
    node = ctx.run(opener.open(options))
    made = Device(ctx, options, opener, node)
    yield made
    if made.node.node_name in opener.nodes:
        ctx.run(made.node.flush())
        ctx.run(made.node.close())
    image = folder / "disk.qcow2"
    if image.exists():
        verdict = QemuImg.check(image)
        assert verdict.corruptions == 0, verdict.text
        assert verdict.leaks == 0, verdict.text


def test_length_and_content_are_the_images(device: Device) -> None:
    assert device.node.length_bytes == SIZE
    device.check()


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (511, 2), (65535, 2), (4096, 65536), (SIZE - 1, 1), (0, SIZE)]
)
def test_write_changes_these_bytes_and_no_others(device: Device, offset: int, length: int) -> None:
    device.ctx.run(device.write(offset, b"w" * length))
    device.check()
    device.reopen()
    device.check()


@pytest.mark.parametrize("flags", [RequestFlags.NONE, RequestFlags.MAY_UNMAP])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 65536), (1, 65536), (65536 * 3 - 7, 131072), (SIZE - 9, 9)]
)
def test_zeroes_read_as_zeroes(
    device: Device, offset: int, length: int, flags: RequestFlags
) -> None:
    device.ctx.run(device.zero(offset, length, flags))
    device.check()
    device.reopen()
    device.check()


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 65536), (1, 65536), (65536 * 3 - 7, 131072), (SIZE - 9, 9)]
)
def test_written_zero_bytes_read_as_zeroes(device: Device, offset: int, length: int) -> None:
    device.ctx.run(device.write(offset, bytes(length), RequestFlags.FUA))
    device.check()
    device.reopen()
    device.check()


def test_compressed_write_is_done_or_refused_as_a_whole(device: Device) -> None:
    before = bytes(device.model)
    content = b"compresses well " * (SIZE // 16)
    write = device.write(0, content, RequestFlags.WRITE_COMPRESSED)
    if device.node.driver.supports_compressed_writes:
        device.ctx.run(write)
    else:
        with pytest.raises(OSError) as caught:
            device.ctx.run(write)
        assert caught.value.errno == errno.ENOTSUP
        assert device.model == before
    device.check()
    device.reopen()
    device.check()


def test_write_over_zeroes_leaves_the_other_bytes_zero(device: Device) -> None:
    device.ctx.run(device.zero(0, 1 << 18, RequestFlags.MAY_UNMAP))
    device.ctx.run(device.write(100_000, b"w" * 10))
    device.check()


def test_discarded_bytes_are_old_or_zero_and_stay_what_they_are(device: Device) -> None:
    start, length = 65536, 1 << 18
    device.ctx.run(device.node.pdiscard(start, length))
    after = device.ctx.run(device.read(0, SIZE))
    for block in range(start, start + length, 512):
        found = after[block : block + 512]
        assert found in (bytes(512), bytes(device.model[block : block + 512]))
    device.model[:] = after
    assert after[:start] == pattern(SIZE)[:start]
    device.reopen()
    device.check()


def test_fua_write_is_there_after_reopening(device: Device) -> None:
    device.ctx.run(device.write(777, b"fua", RequestFlags.FUA))
    device.reopen()
    device.check()


def test_empty_requests_do_nothing(device: Device) -> None:
    device.ctx.run(device.write(SIZE, b""))
    device.ctx.run(device.zero(10, 0, RequestFlags.NONE))
    device.ctx.run(device.node.pdiscard(10, 0))
    assert device.ctx.run(device.read(SIZE, 0)) == b""
    device.check()


def test_request_past_the_end_of_a_format_fails(device: Device) -> None:
    if device.node.driver.is_protocol:
        pytest.skip("a protocol node reads zeroes there")
    for attempt in (device.read(SIZE, 1), device.write(SIZE - 1, b"xy"), device.read(2**62, 1)):
        with pytest.raises(OSError) as caught:
            device.ctx.run(attempt)
        assert caught.value.errno == errno.EIO
    device.check()


def test_block_status_covers_the_device_and_tells_the_truth(device: Device) -> None:
    device.ctx.run(device.zero(65536, 131072, RequestFlags.MAY_UNMAP))
    position = 0
    while position < SIZE:
        status = device.ctx.run(device.node.block_status(position, SIZE - position))
        assert 0 < status.length <= SIZE - position
        if status.zero:
            assert not any(device.model[position : position + status.length])
        position += status.length
    assert position == SIZE


def test_status_runs_say_what_block_status_says(device: Device) -> None:
    """In bulk or one by one: the same of every byte, and always at least one run."""
    device.ctx.run(device.zero(65536, 131072, RequestFlags.MAY_UNMAP))
    device.ctx.run(device.write(300_000, b"x"))
    expected, position = StatusRuns(), 0
    while position < SIZE:
        status = device.ctx.run(device.node.block_status(position, SIZE - position))
        expected.add(status.length, state_of(status))
        position += status.length
    for runs_max in (1, 3, 1000):
        found, position = StatusRuns(), 0
        while position < SIZE:
            asked = device.node.status_runs(position, SIZE - position, runs_max=runs_max)
            runs = device.ctx.run(asked)
            assert 0 < runs.length_bytes <= SIZE - position
            for length, state in zip(runs.lengths, runs.states, strict=True):
                found.add(length, state)
            position += runs.length_bytes
        assert (found.lengths, found.states) == (expected.lengths, expected.states)


def test_concurrent_requests_in_ranges_of_their_own_all_hold(device: Device, seed: int) -> None:
    rng = random.Random(seed)
    lane = SIZE // 16

    async def work(number: int) -> None:
        for _ in range(12):
            start = number * lane + rng.randrange(lane)
            length = rng.randrange(1, (number + 1) * lane - start + 1)
            action = rng.randrange(4)
            if action == 0:
                await device.zero(start, length, RequestFlags.MAY_UNMAP)
            elif action == 1:
                found = await device.read(start, length)
                assert found == device.model[start : start + length]
            else:
                await device.write(start, rng.randbytes(length))
            if rng.randrange(8) == 0:
                await device.node.flush()

    device.ctx.run(gather(*(work(number) for number in range(16))))
    device.check()
    device.reopen()
    device.check()


def test_direct_map_hits_are_what_the_node_reads(device: Device, seed: int) -> None:
    rng = random.Random(seed)
    hits = 0
    for step in range(150):
        direct_map = device.node.driver.direct_map()
        offset = rng.randrange(SIZE - 4096) & ~511
        length = rng.choice([512, 4096])
        data = device.ctx.run(device.read(offset, length))
        assert data == device.model[offset : offset + length]
        host = -1 if direct_map is None else direct_map.lookup_read(offset, length)
        if direct_map is not None and host >= 0:
            hits += 1
            with open(direct_map.file.path, "rb") as file:
                file.seek(host)
                assert file.read(length) == data
        if step % 5 == 0:
            device.ctx.run(device.write(offset, rng.randbytes(length)))
            device.ctx.run(device.zero(offset & ~65535, 65536, RequestFlags.MAY_UNMAP))
    direct_map = device.node.driver.direct_map()
    if direct_map is not None and device.options["driver"] in ("file", "raw"):
        assert hits


def test_writes_through_the_direct_map_are_what_the_node_reads(device: Device) -> None:
    direct_map = device.node.driver.direct_map()
    device.ctx.run(device.write(65536, b"a" * 65536))
    if direct_map is None:
        pytest.skip("clusters are smaller than the file's blocks: no direct map")
    if not device.node.maps_writes:
        assert direct_map.lookup_write(65536, 4096) == -1
        return
    host = direct_map.lookup_write(65536, 4096)
    assert host >= 0
    buffer = device.ctx.buffers.take(4096)
    buffer.view[:4096] = b"d" * 4096
    device.ctx.run(direct_map.file.write(host, buffer.view[:4096]))
    device.ctx.buffers.give(buffer)
    device.model[65536 : 65536 + 4096] = b"d" * 4096
    device.check()
    device.reopen()
    device.check()


def test_device_moves_to_an_iothread_and_back(device: Device) -> None:
    backend = BlockBackend("b", device.node, writable=True)
    thread = IOThread("io0")
    thread.start()
    try:
        device.ctx.run(backend.move_to(thread.ctx))
        write = thread.ctx.spawn_threadsafe(lambda: device.write(1000, b"m" * 70_000))

        async def wait() -> None:
            await write

        device.ctx.run(wait())
        device.ctx.run(backend.move_to(device.ctx))
    finally:
        thread.stop()
    device.check()
    device.ctx.run(backend.close())


def test_read_only_device_reads_and_refuses_to_change(ctx: AioContext, tmp_path: Path) -> None:
    for name, make in CASES.items():
        folder = tmp_path / name
        folder.mkdir()
        options = {**make(folder), "read-only": True}
        node = ctx.run(Opener(files=PosixFiles(), ctx=ctx).open(options))
        for attempt in (
            node.pwritev(0, memoryview(b"x")),
            node.pwrite_zeroes(0, 512),
            node.pdiscard(0, 512),
        ):
            with pytest.raises(OSError) as caught:
                ctx.run(attempt)
            assert caught.value.errno == errno.EPERM, name
        ctx.run(node.close())
