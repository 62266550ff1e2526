# SPDX-License-Identifier: Apache-2.0
"""Errors of the host reach the client as such, and the server stays up.

A full disk is a small tmpfs, where mounting is allowed, and a file size limit (RLIMIT_FSIZE)
everywhere. A broken disk is the device mapper's error target, which hosts in containers seldom
have.
"""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.raw_nbd import CMD_READ, NBD_EIO, NBD_ENOSPC, NBD_OK, RawNbd
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.process import ServerFailed, ServerProcess
from tests.peers.qemu import QemuImg, run_tool
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 32 * MIB
ROOM_MIB = 8
BAD_OFFSET = 16 * MIB
BOTH_FORMATS = pytest.mark.parametrize("fmt", ["raw", "qcow2"])

pytestmark = pytest.mark.usefixtures("only_ours")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted tmpfs with little room; the caller may remount it larger."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = run_tool(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m", "tmpfs", folder], check=False
    )
    if mounted.code != 0:
        pytest.skip(f"mounting isn't allowed here: {mounted.stderr.strip()}")
    yield folder
    run_tool(["umount", folder])


def write_until_error(client: RawNbd) -> tuple[int, int]:
    """Write 1 MiB after the other; the offset of the first that failed, and its error."""
    for offset in range(0, SIZE_BYTES, MIB):
        error = client.write(offset, b"d" * MIB)
        if error != NBD_OK:
            return offset, error
    pytest.fail("the disk never got full")


@pytest.mark.root
@BOTH_FORMATS
def test_full_disk_gives_enospc_and_goes_on_when_there_is_room_again(
    small_disk: Path, serve: Serve, fmt: str
) -> None:
    require_peer("qemu-img")
    image = QemuImg.create(small_disk / f"disk.{fmt}", SIZE_BYTES, fmt=fmt)
    with serve(image, fmt=fmt) as server, RawNbd.connected(server.socket_path, "disk") as client:
        full_at, error = write_until_error(client)
        assert error == NBD_ENOSPC
        assert client.read(0, MIB) == b"d" * MIB
        assert client.write(0, b"e" * 4096) == NBD_OK, "what is allocated can still be written"
        run_tool(["mount", "-o", f"remount,size={SIZE_BYTES // MIB * 2}m", small_disk])
        assert client.write(full_at, b"f" * MIB) == NBD_OK
        assert client.flush() == NBD_OK
        assert client.read(full_at, MIB) == b"f" * MIB
    if fmt == "qcow2":
        found = QemuImg.check(image)
        assert (found.corruptions, found.errors) == (0, 0), found.text
    with serve(image, fmt=fmt) as server, RawNbd.connected(server.socket_path, "disk") as client:
        assert client.read(0, 4096) == b"e" * 4096
        assert client.read(MIB, full_at - MIB) == b"d" * (full_at - MIB)
        assert client.read(full_at, MIB) == b"f" * MIB


@pytest.mark.parametrize("cache", ["writeback", "direct"])
@BOTH_FORMATS
def test_file_size_limit_gives_an_error_and_the_server_stays_up(
    direct_dir: Path, socket_path: Path, fmt: str, cache: str
) -> None:
    require_peer("qemu-img")
    require_peer("prlimit")
    image = QemuImg.create(direct_dir / f"disk.{fmt}", SIZE_BYTES, fmt=fmt)
    daemon = BlockemuDaemon(image, fmt=fmt, socket_path=socket_path, export="disk", cache=cache)
    daemon.command[:0] = ["prlimit", f"--fsize={ROOM_MIB * MIB}", "--"]
    with daemon, RawNbd.connected(daemon.socket_path, "disk") as client:
        full_at, error = write_until_error(client)
        assert error in (NBD_ENOSPC, NBD_EIO)
        assert full_at >= ROOM_MIB * MIB // 2
        assert client.read(0, MIB) == b"d" * MIB
        assert client.write(0, b"e" * 4096) == NBD_OK
        assert client.flush() == NBD_OK
        with RawNbd.connected(daemon.socket_path, "disk") as other:
            assert other.read(0, 4096) == b"e" * 4096
    if fmt == "qcow2":
        found = QemuImg.check(image)
        assert (found.corruptions, found.errors) == (0, 0), found.text


class BrokenDisk(ServerProcess):
    """A file with bad sectors: qemu's blkdebug node, shown as a file through FUSE."""

    def __init__(self, folder: Path) -> None:
        store = folder / "store"
        store.write_bytes(bytes(SIZE_BYTES))
        self.image = folder / "broken.img"
        self.image.touch()
        bad = [
            {"event": "none", "iotype": kind, "sector": BAD_OFFSET // 512, "errno": errno.EIO}
            for kind in ("read", "write")
        ]
        file = {"driver": "file", "node-name": "file", "filename": str(store), "locking": "off"}
        node = {"driver": "blkdebug", "node-name": "bad", "image": "file", "inject-error": bad}
        command = ["qemu-storage-daemon", "--blockdev", json.dumps(file)]
        command += ["--blockdev", json.dumps(node), "--export"]
        command += [f"fuse,id=fuse,node-name=bad,mountpoint={self.image},writable=on"]
        command += ["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]
        super().__init__(command, socket_path=folder / "unused")

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn(self.command, stdin=subprocess.PIPE)
        while "QMP" not in self.read_line():
            pass
        return self


@pytest.fixture
def broken_disk(tmp_path: Path) -> Iterator[Path]:
    """A raw image file with a sector that answers with EIO."""
    require_peer("qemu-storage-daemon")
    disk = BrokenDisk(tmp_path)
    try:
        try:
            disk.start()
        except ServerFailed as error:
            pytest.skip(f"FUSE isn't usable here: {error}")
        yield disk.image
        disk.stop()
    finally:
        disk.discard()


@pytest.mark.parametrize(
    ("cache", "aio"), [("writeback", None), ("direct", "native"), ("direct", "threads")]
)
def test_bad_sector_gives_eio_and_the_rest_goes_on(
    broken_disk: Path, serve: Serve, cache: str, aio: str | None
) -> None:
    with (
        serve(broken_disk, fmt="raw", cache=cache, aio=aio) as server,
        RawNbd.connected(server.socket_path, "disk") as client,
    ):
        assert client.call(CMD_READ, BAD_OFFSET, 4096).error == NBD_EIO
        assert client.write(BAD_OFFSET, b"x" * 4096) == NBD_EIO
        assert client.read(0, 4096) == bytes(4096)
        assert client.write(4096, b"y" * 4096) == NBD_OK
        assert client.read(4096, 4096) == b"y" * 4096
        with RawNbd.connected(server.socket_path, "disk") as other:
            assert other.read(4096, 4096) == b"y" * 4096
            assert other.call(CMD_READ, BAD_OFFSET + 512, 512).error in (NBD_OK, NBD_EIO)
