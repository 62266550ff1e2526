# SPDX-License-Identifier: Apache-2.0
"""file and raw over real host files, page cache and O_DIRECT, to the byte."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.child import Role
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.memory_file import MemoryFile, MemoryFiles

MODES = [
    pytest.param({"cache": {"direct": False}, "aio": "native"}, id="cached"),
    pytest.param({"cache": {"direct": False}, "aio": "threads"}, id="cached-threads"),
    pytest.param({"cache": {"direct": True}, "aio": "native"}, id="direct-native"),
    pytest.param({"cache": {"direct": True}, "aio": "threads"}, id="direct-threads"),
]


def open_file(ctx: AioContext, opener: Opener, path: Path, **more: Any) -> BlockDriverState:
    return ctx.run(opener.open({"driver": "file", "filename": str(path), **more}))


def read(ctx: AioContext, node: BlockDriverState, offset: int, length: int) -> bytes:
    target = bytearray(length)
    ctx.run(node.preadv(offset, memoryview(target)))
    return bytes(target)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(4096 * 5 + 777))
    return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4096), (1, 1), (4095, 2), (0, 4096 * 5 + 777), (4096 * 5, 777), (4096 * 5 + 770, 7)],
)
def test_read_is_the_files_bytes(
    ctx: AioContext, opener: Opener, image: Path, mode: dict[str, Any], offset: int, length: int
) -> None:
    node = open_file(ctx, opener, image, **mode)
    assert read(ctx, node, offset, length) == image.read_bytes()[offset : offset + length]
    ctx.run(node.close())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4096), (1, 1), (4095, 4098), (4096 * 5, 777), (4096 * 5 + 776, 1), (4096 * 4 + 9, 4864)],
)
def test_write_changes_these_bytes_and_not_the_size(
    ctx: AioContext, opener: Opener, image: Path, mode: dict[str, Any], offset: int, length: int
) -> None:
    expected = bytearray(image.read_bytes())
    data = os.urandom(length)
    expected[offset : offset + length] = data
    node = open_file(ctx, opener, image, **mode)
    ctx.run(node.pwritev(offset, memoryview(data)))
    ctx.run(node.flush())
    assert read(ctx, node, 0, len(expected)) == expected
    ctx.run(node.close())
    assert image.read_bytes() == expected


@pytest.mark.parametrize("mode", MODES)
def test_write_past_the_end_makes_the_file_grow(
    ctx: AioContext, opener: Opener, image: Path, mode: dict[str, Any]
) -> None:
    before = image.read_bytes()
    node = open_file(ctx, opener, image, **mode)
    ctx.run(node.pwritev(65536, memoryview(b"x" * 512)))
    assert node.length_bytes == 65536 + 512
    assert read(ctx, node, len(before), 65536 - len(before)) == bytes(65536 - len(before))
    ctx.run(node.close())
    assert image.read_bytes() == before + bytes(65536 - len(before)) + b"x" * 512


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flags", [RequestFlags.NONE, RequestFlags.MAY_UNMAP])
@pytest.mark.parametrize(
    ("offset", "length"), [(4096, 8192), (5, 9000), (4096 * 4 + 1, 4096 + 776)]
)
def test_zeroes_are_zeroes_and_nothing_else(
    ctx: AioContext,
    opener: Opener,
    image: Path,
    mode: dict[str, Any],
    flags: RequestFlags,
    offset: int,
    length: int,
) -> None:
    expected = bytearray(image.read_bytes())
    expected[offset : offset + length] = bytes(length)
    node = open_file(ctx, opener, image, **mode)
    ctx.run(node.pwrite_zeroes(offset, length, flags))
    assert read(ctx, node, 0, len(expected)) == expected
    ctx.run(node.close())
    assert image.read_bytes() == expected


def test_discard_of_the_tail_keeps_the_size(ctx: AioContext, opener: Opener, image: Path) -> None:
    size = image.stat().st_size
    node = open_file(ctx, opener, image)
    ctx.run(node.pdiscard(4096, size - 4096))
    ctx.run(node.close())
    assert image.stat().st_size == size


def test_block_status_tells_holes_from_data(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(65536)
        file.write(b"d" * 65536)
    node = open_file(ctx, opener, path)
    hole = ctx.run(node.block_status(0, 1 << 20))
    data = ctx.run(node.block_status(65536, 1 << 20))
    assert (hole.data, hole.zero, hole.length) == (False, True, 65536)
    assert (data.data, data.zero, data.length, data.host_offset) == (True, False, 65536, 65536)
    ctx.run(node.close())


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing", "No such file"), ("folder", "Is a directory"), ("fifo", "not a regular file")],
)
def test_what_cant_be_opened_is_named_with_the_reason(
    ctx: AioContext, opener: Opener, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / name
    with pytest.raises(ImageError, match=f"^{path}: .*{words}"):
        open_file(ctx, opener, path)
    assert opener.nodes == {}


def test_unknown_option_is_refused_and_the_file_closed(
    ctx: AioContext, opener: Opener, image: Path
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="has no option 'fielname'"):
        open_file(ctx, opener, image, fielname="x")
    assert len(os.listdir("/proc/self/fd")) == descriptors


def open_raw(ctx: AioContext, opener: Opener, image: Path, **more: Any) -> BlockDriverState:
    options = {"driver": "raw", "file": {"driver": "file", "filename": str(image)}, **more}
    return ctx.run(opener.open(options))


def test_raw_window_is_read_and_written_in_its_place(
    ctx: AioContext, opener: Opener, image: Path
) -> None:
    expected = bytearray(image.read_bytes())
    node = open_raw(ctx, opener, image, offset=1000, size=500)
    assert node.length_bytes == 500
    assert read(ctx, node, 0, 500) == expected[1000:1500]
    ctx.run(node.pwritev(490, memoryview(b"0123456789")))
    with pytest.raises(OSError):
        ctx.run(node.pwritev(491, memoryview(b"0123456789")))
    ctx.run(node.close())
    expected[1490:1500] = b"0123456789"
    assert image.read_bytes() == expected


def test_raw_window_past_the_end_is_refused(ctx: AioContext, opener: Opener, image: Path) -> None:
    with pytest.raises(ImageError, match=f"^{image}: offset 21000 and size 600 reach past its end"):
        open_raw(ctx, opener, image, offset=21000, size=600)
    assert opener.nodes == {}


@pytest.mark.parametrize("mode", MODES)
def test_direct_map_of_raw_covers_whole_blocks(
    ctx: AioContext, opener: Opener, image: Path, mode: dict[str, Any]
) -> None:
    options = {"driver": "raw", "file": {"driver": "file", "filename": str(image), **mode}}
    node = ctx.run(opener.open(options))
    direct_map = node.driver.direct_map()
    assert direct_map is not None
    size = image.stat().st_size
    assert direct_map.lookup_read(4096, 8192) == 4096
    assert direct_map.lookup_write(4096, 8192) == 4096
    assert direct_map.lookup_read(size - 1, 1) == (-1 if mode["cache"]["direct"] else size - 1)
    ctx.run(node.close())


def test_raw_is_cut_only_after_the_writes_by_its_direct_map(ctx: AioContext) -> None:
    """It wasn't waited for them: one that was under way made the file long again, behind the
    end that the node knew of."""
    files = MemoryFiles()
    image = files.add("disk", bytes(16384))
    opener = Opener(files=files, ctx=ctx)
    options = {"driver": "raw", "file": {"driver": "file", "filename": "disk"}}
    node = ctx.run(opener.open(options))
    direct_map = node.driver.direct_map()
    assert direct_map is not None
    pin = direct_map.pin()
    cut = ctx.spawn(node.truncate(4096))
    assert direct_map.lookup_write(8192, 4096) == -1
    assert len(image.content) == 16384
    direct_map.unpin(pin)
    while not cut.done():
        ctx.poll(blocking=True)
    assert len(image.content) == node.length_bytes == 4096
    ctx.run(node.close())


class DeviceFile(MemoryFile):
    """As a host's block device: it has the size that somebody else gave it."""

    is_block_device = True

    async def truncate(self, length: int) -> None:
        raise OSError(errno.ENOTSUP, "a block device keeps its size", self.path)


class Devices(MemoryFiles):
    """All of whose files are devices."""

    def open(
        self, path: str, *, read_only: bool, direct: bool = False, aio: str = "threads"
    ) -> DeviceFile:
        return DeviceFile(
            self.images[path], path, read_only=read_only, direct=direct, alignment=512
        )


def test_a_device_that_has_grown_is_taken_at_the_size_that_it_has(ctx: AioContext) -> None:
    """It was refused, beyond the size that the device had when it was opened."""
    devices = Devices()
    image = devices.add("lv", bytes(8192))
    opener = Opener(files=devices, ctx=ctx)
    options = {"driver": "raw", "file": {"driver": "host_device", "filename": "lv"}}
    node = ctx.run(opener.open(options))
    with pytest.raises(OSError, match="the device ends at 8192") as caught:
        ctx.run(node.truncate(16384))
    assert caught.value.errno == errno.ENOSPC
    image.content.extend(b"n" * 8192)
    assert node.length_bytes == 8192
    for size, refusal in ((32768, errno.ENOSPC), (12288, errno.ENOTSUP)):
        with pytest.raises(OSError, match="16384") as caught:
            ctx.run(node.truncate(size))
        assert caught.value.errno == refusal
        assert node.length_bytes == 8192
    ctx.run(node.truncate(16384))
    assert node.length_bytes == 16384
    assert read(ctx, node, 12288, 512) == b"n" * 512
    del image.content[4096:]
    ctx.run(node.truncate(4096))
    assert node.length_bytes == 4096
    ctx.run(node.close())


@pytest.mark.root
def test_a_real_device_that_has_grown_is_taken(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", path], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        node = open_file(ctx, opener, Path(device))
        with path.open("ab") as file:
            file.write(b"n" * (1 << 20))
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        ctx.run(node.truncate(2 << 20))
        assert node.length_bytes == 2 << 20
        assert read(ctx, node, (2 << 20) - 512, 512) == b"n" * 512
        ctx.run(node.close())
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_direct_map_of_a_read_only_node_isnt_writable(
    ctx: AioContext, opener: Opener, image: Path
) -> None:
    node = open_raw(ctx, opener, image, **{"read-only": True})
    direct_map = node.driver.direct_map()
    assert direct_map is not None
    assert direct_map.lookup_read(0, 512) == 0
    assert direct_map.lookup_write(0, 512) == -1
    ctx.run(node.close())


def test_two_opens_for_writing_are_refused_and_the_first_goes_on(
    ctx: AioContext, opener: Opener, image: Path
) -> None:
    first = open_raw(ctx, opener, image)
    with pytest.raises(ImageError, match=f"^{image}: is in use by another process"):
        open_raw(ctx, opener, image)
    with pytest.raises(ImageError, match=f"^{image}: is in use by another process"):
        open_raw(ctx, opener, image, **{"read-only": True})
    ctx.run(first.close())
    second = open_raw(ctx, opener, image)
    ctx.run(second.close())


def test_two_readers_share_and_keep_a_writer_out(
    ctx: AioContext, opener: Opener, image: Path
) -> None:
    readers = [open_raw(ctx, opener, image, **{"read-only": True}) for _ in range(2)]
    with pytest.raises(ImageError, match="is in use"):
        open_raw(ctx, opener, image)
    for reader in readers:
        ctx.run(reader.close())


def test_forced_share_takes_no_lock(ctx: AioContext, opener: Opener, image: Path) -> None:
    writer = open_raw(ctx, opener, image)
    reader = open_raw(ctx, opener, image, **{"read-only": True, "force-share": True})
    ctx.run(reader.close())
    ctx.run(writer.close())


def test_node_shared_by_name_is_closed_with_its_last_parent(
    ctx: AioContext, opener: Opener, image: Path
) -> None:
    options = {"driver": "file", "filename": str(image), "node-name": "f", "read-only": True}
    file = ctx.run(opener.open(options))
    tops = [
        ctx.run(opener.open({"driver": "raw", "file": "f", "read-only": True})) for _ in range(2)
    ]
    assert [edge.role for edge in file.parents] == [Role.DATA, Role.DATA]
    ctx.run(tops[0].close())
    assert "f" in opener.nodes
    ctx.run(tops[1].close())
    assert opener.nodes == {}
