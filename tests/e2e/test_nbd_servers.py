# SPDX-License-Identifier: Apache-2.0
"""Our NBD client against servers of every kind: nbdkit with filters that make it worse, qemu-nbd,
and our own. What is written through it is on the disk, and what is read is what is there."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.registry import DriverTable, Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import PosixFiles
from blockemu.loop.sync import gather
from tests.e2e.test_nbd_chain import json_name
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.nbdkit import NbdKit
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuNbd, ToolFailed, run_tool
from tests.peers.requirement import require_peer
from tests.unit.qmp.test_nbd_server import Qmp

MIB = 1 << 20
SIZE = 4 * MIB
BLOCK = 4096

pytestmark = pytest.mark.usefixtures("only_ours")
Start = Callable[[Path, Path], ServerProcess]


def nbdkit(*filters: str, extra: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Start:
    def start(image: Path, socket: Path) -> ServerProcess:
        require_peer("nbdkit")
        server = NbdKit(image, socket_path=socket, filters=filters, extra=extra)
        server.command[1:1] = flags
        return server

    return start


def qemu_nbd(image: Path, socket: Path) -> ServerProcess:
    require_peer("qemu-nbd")
    return QemuNbd(image, fmt="raw", socket_path=socket, shared=8)


def ours(image: Path, socket: Path) -> ServerProcess:
    return BlockemuDaemon(image, fmt="raw", socket_path=socket)


class Case(NamedTuple):
    """`options`: of our client."""

    start: Start
    options: dict[str, str | int] = {}  # noqa: RUF012  (never changed)


SERVERS: dict[str, Case] = {
    "nbdkit": Case(nbdkit()),
    "nbdkit-multi-conn": Case(nbdkit(), {"multi-conn": 4}),
    "no-multi-conn": Case(
        nbdkit("multi-conn", extra=("multi-conn-mode=disable",)), {"multi-conn": 4}
    ),
    "emulated-multi-conn": Case(
        nbdkit("multi-conn", extra=("multi-conn-mode=emulate",)), {"multi-conn": 4}
    ),
    "delay": Case(nbdkit("delay", extra=("rdelay=1ms", "wdelay=1ms")), {"multi-conn": 2}),
    "block-sizes": Case(
        nbdkit(
            "blocksize-policy",
            extra=(
                "blocksize-error-policy=error", "blocksize-minimum=4096",
                "blocksize-preferred=16384", "blocksize-maximum=65536",
            ),
        )
    ),
    "small-blocks": Case(
        nbdkit(
            "blocksize-policy",
            extra=(
                "blocksize-error-policy=error", "blocksize-minimum=1", "blocksize-preferred=512",
                "blocksize-maximum=1M",
            ),
        )
    ),
    "no-extents": Case(nbdkit("noextents")),
    "no-zeroes": Case(nbdkit("nozero")),
    "no-fast-zeroes": Case(nbdkit("nozero", extra=("fastzeromode=none",))),
    "no-fua": Case(nbdkit("fua")),
    "emulated-fua": Case(nbdkit("fua", extra=("fuamode=emulate",))),
    "forced-fua": Case(nbdkit("fua", extra=("fuamode=force",))),
    "no-parallel": Case(nbdkit("noparallel", extra=("serialize=all-requests",))),
    "no-structured-replies": Case(nbdkit(flags=("--no-sr",))),
    "old-handshake": Case(nbdkit(flags=("--mask-handshake=0",))),
    "cache": Case(nbdkit("cache", "readahead")),
    "cow": Case(nbdkit("retry", "log", extra=("logfile=/dev/null",))),
    "qemu-nbd": Case(qemu_nbd),
    "qemu-nbd-multi-conn": Case(qemu_nbd, {"multi-conn": 4}),
    "ours": Case(ours),
    "ours-multi-conn": Case(ours, {"multi-conn": 4}),
}  # fmt: skip


@contextmanager
def backend_on(socket: Path, **options: str | int) -> Iterator[tuple[AioContext, BlockBackend]]:
    """Our client in this process."""
    ctx = AioContext("test")
    ctx.adopt()
    try:
        opener = Opener(files=PosixFiles(), ctx=ctx, drivers=DriverTable())
        node = ctx.run(opener.open({"driver": "nbd", "path": str(socket), **options}))
        backend = BlockBackend("disk", node, writable=True)
        yield ctx, backend
        ctx.run(backend.close())
    finally:
        ctx.close()


class Disk:
    """What the disk holds, request by request; those at one time touch different parts of it."""

    def __init__(self, backend: BlockBackend, rng: random.Random) -> None:
        self.backend = backend
        self.content = bytearray(SIZE)
        self.unsure = bytearray(SIZE)
        """Not 0 where a trim was, and the content is the server's choice."""
        self._rng = rng

    async def some(self) -> None:
        """A batch at random."""
        parts = self._rng.sample(range(16), 8)
        await gather(*(self._one(part * (SIZE // 16)) for part in parts))
        await self.backend.flush()

    async def _one(self, start: int) -> None:
        rng, backend = self._rng, self.backend
        length = rng.choice((1, 511, 512, 4096, 40_000, rng.randrange(1, SIZE // 16)))
        offset = start + rng.randrange(SIZE // 16 - length + 1)
        part = slice(offset, offset + length)
        flags = rng.choice((RequestFlags.NONE, RequestFlags.FUA))
        how = rng.randrange(5)
        if how < 2:
            data = rng.randbytes(length)
            await backend.pwritev(offset, memoryview(data), flags)
            self.content[part], self.unsure[part] = data, bytes(length)
        elif how == 2:
            flags |= rng.choice((RequestFlags.NONE, RequestFlags.MAY_UNMAP))
            await backend.pwrite_zeroes(offset, length, flags)
            self.content[part] = self.unsure[part] = bytes(length)
        elif how == 3:
            await backend.pdiscard(offset, length)
            self.unsure[part] = b"\1" * length
        else:
            await self.check(offset, length)

    async def check(self, offset: int, length: int) -> None:
        view = memoryview(bytearray(length))
        await self.backend.preadv(offset, view)
        self.judge(offset, view)

    def judge(self, offset: int, found: bytes | memoryview) -> None:
        part = slice(offset, offset + len(found))
        if found != self.content[part]:
            wrong = [
                at
                for at, (byte, right) in enumerate(zip(found, self.content[part], strict=True))
                if byte != right and not (self.unsure[offset + at] and not byte)
            ]
            assert not wrong, f"{len(wrong)} wrong bytes from {offset + wrong[0]} on"

    async def check_status(self) -> None:
        """It goes through the whole disk, and what is said to be zero is."""
        offset = 0
        while offset < SIZE:
            status = await self.backend.block_status(offset, SIZE - offset)
            assert 0 < status.length <= SIZE - offset
            if status.zero:
                self.judge(offset, bytes(status.length))
            offset += status.length
        assert offset == SIZE


@pytest.mark.parametrize("name", SERVERS)
def test_what_is_written_is_what_is_there(
    tmp_path: Path, run_dir: Path, random_seed: int, name: str
) -> None:
    case = SERVERS[name]
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE))
    with (
        case.start(image, run_dir / "s"),
        backend_on(run_dir / "s", **case.options) as (ctx, backend),
    ):
        disk = Disk(backend, random.Random(f"{random_seed}-{name}"))
        for _ in range(4):
            ctx.run(disk.some())
        ctx.run(disk.check_status())
        ctx.run(disk.check(0, SIZE))
    disk.judge(0, image.read_bytes())


def test_errors_of_a_server_are_told_and_go_by(tmp_path: Path, run_dir: Path) -> None:
    """While a file exists, every request is an error; after it, all is well."""
    require_peer("nbdkit")
    image, trigger = tmp_path / "disk", tmp_path / "trigger"
    image.write_bytes(bytes(SIZE))
    start = nbdkit("error", extra=("error=ENOSPC", "error-rate=100%", f"error-file={trigger}"))
    with start(image, run_dir / "s"), backend_on(run_dir / "s") as (ctx, backend):
        trigger.touch()
        for call in (
            lambda: backend.pwritev(0, memoryview(bytes(512))),
            lambda: backend.pwrite_zeroes(0, 512),
            lambda: backend.pdiscard(0, 512),
        ):
            with pytest.raises(OSError, match="No space left on device"):
                ctx.run(call())
        trigger.unlink()
        ctx.run(backend.pwritev(0, memoryview(b"x" * 512)))
    assert image.read_bytes()[:512] == b"x" * 512


def test_our_own_server_is_asked_for_a_terabyte_at_once(tmp_path: Path, run_dir: Path) -> None:
    """By extended headers: a trim, zeroes and a status of all of it are a request each."""
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(1 << 40)
    control = run_dir / "c"
    server = BlockemuDaemon(
        image, fmt="raw", socket_path=run_dir / "s", extra=["--control", str(control)]
    )
    with server, backend_on(run_dir / "s") as (ctx, backend):
        ctx.run(backend.pwritev(1 << 39, memoryview(b"x" * 4096)))
        status = ctx.run(backend.block_status(0, 1 << 40))
        assert (status.length, status.zero) == (1 << 39, True)
        ctx.run(backend.pwrite_zeroes(0, 1 << 40, RequestFlags.MAY_UNMAP))
        ctx.run(backend.pdiscard(0, 1 << 40))
        status = ctx.run(backend.block_status(0, 1 << 40))
        assert (status.length, status.zero) == (1 << 40, True)
        qmp = Qmp(control)
        (statistics,) = qmp("x-query-export-stats")
        qmp.close()
    counts = {found["operation"]: found["requests"] for found in statistics["operations"]}
    assert (counts["trim"], counts["write-zeroes"], counts["write"]) == (1, 1, 1)
    assert image.stat().st_blocks == 0


@pytest.mark.parametrize("connections", [1, 4])
def test_img_convert_reads_and_writes_exports(
    tmp_path: Path, run_dir: Path, connections: int
) -> None:
    require_peer("nbdkit")
    source, target = tmp_path / "source", tmp_path / "target"
    rng = random.Random(connections)
    source.write_bytes(rng.randbytes(MIB) + bytes(2 * MIB) + rng.randbytes(MIB))
    target.write_bytes(b"x" * SIZE)
    with (
        nbdkit()(source, run_dir / "s"),
        nbdkit()(target, run_dir / "t"),
    ):
        names = [json_name(run_dir / name, "", **{"multi-conn": connections}) for name in "st"]
        run_tool([sys.executable, "-m", "blockemu", "img", "convert", "-n", "-O", "raw", *names])
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("multi-conn=0", "option 'multi-conn' is a number from 1 to 16, not 0"),
        ("multi-conn=17", "option 'multi-conn' is a number from 1 to 16, not 17"),
        ("x-dirty-bitmap=", "option 'x-dirty-bitmap' has 1 to 4096 bytes"),
        ("reconnect-delay=-1", "'reconnect-delay' is a number from 0 to 4294967295, not '-1'"),
        ("server.cid=3", "driver 'nbd' has no option 'server.cid'"),
    ],
)
def test_bad_options_are_one_line(run_dir: Path, options: str, reason: str) -> None:
    words = f"driver=nbd,server.type=unix,server.path={run_dir / 's'},{options}"
    with pytest.raises(ToolFailed) as caught:
        run_tool([sys.executable, "-m", "blockemu", "img", "info", "--image-opts", words])
    said = caught.value.result
    assert said.code == 1
    assert reason in said.stderr
    assert said.stderr.count("\n") == 1
