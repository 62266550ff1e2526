# SPDX-License-Identifier: Apache-2.0
"""Opening real files, and the paths of each engine that a healthy disk never takes."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.loop import blocking_io, direct_alignment
from blockemu.loop.aio_context import AioContext
from blockemu.loop.blocking_io import read_fully, write_fully
from blockemu.loop.buffers import Buffer
from blockemu.loop.coroutine import Future
from blockemu.loop.direct_alignment import probe_direct_alignment
from blockemu.loop.direct_file import DirectFile
from blockemu.loop.file_engine import NativeKind
from blockemu.loop.host_file import HostFile, PosixFiles
from blockemu.loop.memory_file import MemoryFiles
from blockemu.loop.page_cache_file import MemoryFilesystemFile, PageCacheFile

BLOCK = 4096


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    ctx = AioContext("test")
    yield ctx
    ctx.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file of 16 blocks; block n is filled with byte n."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * BLOCK for number in range(16)))
    return str(path)


def open_file(path: str, ctx: AioContext, **options: Any) -> HostFile:
    settings: dict[str, Any] = {"read_only": False, "direct": False, "aio": "threads"} | options
    file = PosixFiles().open(path, **settings)
    file.attach(ctx)
    return file


async def finish(start: Callable[..., int | None], offset: int, view: memoryview) -> int:
    future: Future[int] = Future(shielded=True)
    result = start(offset, view, future.set_result)
    return await future if result is None else result


# Opening


@pytest.mark.parametrize("read_only", [True, False])
def test_open_of_folder_is_refused(tmp_path: Path, ctx: AioContext, read_only: bool) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        open_file(str(tmp_path), ctx, read_only=read_only)
    assert caught.value.filename == str(tmp_path)


def test_open_of_fifo_is_refused_and_does_not_wait(tmp_path: Path, ctx: AioContext) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file or block device"):
        open_file(str(tmp_path / "fifo"), ctx)


def test_open_of_character_device_is_refused(ctx: AioContext) -> None:
    with pytest.raises(OSError, match="not a regular file or block device"):
        open_file("/dev/zero", ctx)


def test_open_without_direct_io_says_so(
    path: str, ctx: AioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, flags: int, mode: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument", name)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError) as caught:
        open_file(path, ctx, direct=True)
    assert caught.value.errno == errno.EINVAL
    assert "does not support O_DIRECT" in str(caught.value)
    assert caught.value.filename == path


def test_open_leaves_descriptor_blocking_and_closed_on_exec(path: str, ctx: AioContext) -> None:
    file = open_file(path, ctx)
    assert isinstance(file, PageCacheFile)
    assert os.get_blocking(file._fd)
    assert not os.get_inheritable(file._fd)
    file.close()


def test_failed_open_leaks_no_descriptor(tmp_path: Path, ctx: AioContext) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        open_file(str(tmp_path), ctx, read_only=True)
    assert len(os.listdir("/proc/self/fd")) == before


# Page cache


def test_read_goes_to_worker_where_nowait_is_refused(
    path: str, ctx: AioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_file(path, ctx)
    assert isinstance(file, PageCacheFile)
    file._reads_nowait = True
    real = os.preadv

    def refuses(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuses)
    view = memoryview(bytearray(BLOCK))
    assert ctx.run(finish(file.start_read, BLOCK, view)) == BLOCK
    assert bytes(view) == b"\x01" * BLOCK
    assert not file._reads_nowait
    file.close()


def test_partly_cached_read_is_completed_by_worker(
    path: str, ctx: AioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_file(path, ctx)
    assert isinstance(file, PageCacheFile)
    file._reads_nowait = True
    real = os.preadv

    def has_one_block(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return real(fd, [buffers[0][:BLOCK]] if flags else buffers, offset)

    monkeypatch.setattr(os, "preadv", has_one_block)
    view = memoryview(bytearray(3 * BLOCK))
    assert ctx.run(finish(file.start_read, BLOCK, view)) == 3 * BLOCK
    assert bytes(view) == b"\x01" * BLOCK + b"\x02" * BLOCK + b"\x03" * BLOCK
    file.close()


def test_read_error_reaches_caller_as_errno(
    path: str, ctx: AioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_file(path, ctx)

    def fails(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", fails)
    view = memoryview(bytearray(BLOCK))
    assert ctx.run(finish(file.start_read, 0, view)) == -errno.EIO
    with pytest.raises(OSError) as caught:
        ctx.run(file.read(0, view))
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)
    file.close()


# Transfers that come short


def test_read_fully_goes_on_after_short_reads(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:1000]], at))
    fd = os.open(path, os.O_RDONLY)
    view = memoryview(bytearray(2 * BLOCK))
    assert read_fully(fd, view, BLOCK) == 2 * BLOCK
    assert bytes(view) == b"\x01" * BLOCK + b"\x02" * BLOCK
    os.close(fd)


def test_write_fully_goes_on_after_short_writes(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: real(fd, view[:1000], at))
    fd = os.open(path, os.O_RDWR)
    assert write_fully(fd, memoryview(b"w" * 5000), 10) == 5000
    assert os.pread(fd, 5002, 9) == b"\x00" + b"w" * 5000 + b"\x01"
    os.close(fd)


def test_write_fully_reports_error_after_short_write(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def full(fd: int, view: memoryview, at: int) -> int:
        if at:
            raise OSError(errno.ENOSPC, "full")
        return 1000

    monkeypatch.setattr(os, "pwrite", full)
    assert write_fully(0, memoryview(bytes(BLOCK)), 0) == -errno.ENOSPC


@pytest.mark.parametrize("result", [-errno.EAGAIN, -errno.EINTR, BLOCK])
def test_direct_read_that_comes_short_is_completed(path: str, ctx: AioContext, result: int) -> None:
    file = open_file(path, ctx, direct=True, aio="native")
    assert isinstance(file, DirectFile)
    view = Buffer(4 * BLOCK).view
    view[:BLOCK] = b"\x02" * BLOCK  # what a short read of a block would have left
    done: list[int] = []
    file._read_short(2 * BLOCK, view, result, done.append)
    while not done:
        ctx.poll(blocking=True)
    assert done == [4 * BLOCK]
    assert bytes(view) == b"".join(bytes([number]) * BLOCK for number in (2, 3, 4, 5))
    file.close()


@pytest.mark.parametrize("result", [-errno.EIO, 0, 700])
def test_direct_read_at_end_or_failed_is_final(path: str, ctx: AioContext, result: int) -> None:
    file = open_file(path, ctx, direct=True, aio="native")
    assert isinstance(file, DirectFile)
    done: list[int] = []
    file._read_short(0, Buffer(BLOCK).view, result, done.append)
    assert done == [result]
    file.close()


@pytest.mark.parametrize("result", [-errno.EAGAIN, 0, 100, BLOCK + 100])
def test_direct_write_that_comes_short_is_completed(
    path: str, ctx: AioContext, result: int
) -> None:
    file = open_file(path, ctx, direct=True, aio="native")
    assert isinstance(file, DirectFile)
    view = Buffer(2 * BLOCK).view
    view[:] = b"w" * (2 * BLOCK)
    done: list[int] = []
    file._write_short(0, view, result, done.append)
    while not done:
        ctx.poll(blocking=True)
    assert done == [2 * BLOCK]
    written = max(result, 0) // BLOCK * BLOCK  # by the request that came short
    assert Path(path).read_bytes()[written : 2 * BLOCK] == b"w" * (2 * BLOCK - written)
    file.close()


def test_direct_write_that_fails_reports_errno(path: str, ctx: AioContext) -> None:
    file = open_file(path, ctx, direct=True, aio="native")
    assert isinstance(file, DirectFile)
    done: list[int] = []
    file._write_short(0, Buffer(BLOCK).view, -errno.ENOSPC, done.append)
    assert done == [-errno.ENOSPC]
    file.close()


def test_native_falls_back_to_workers_where_context_has_no_aio(path: str, ctx: AioContext) -> None:
    ctx._linux_aio_tried = True  # and none was found
    file = open_file(path, ctx, direct=True, aio="native")
    view = Buffer(BLOCK).view
    assert ctx.run(finish(file.start_read, BLOCK, view)) == BLOCK
    assert bytes(view) == b"\x01" * BLOCK
    file.close()


# For C code


@pytest.mark.parametrize("reads_nowait", [True, False])
def test_page_cache_is_read_natively_where_it_never_waits(
    path: str, ctx: AioContext, reads_nowait: bool
) -> None:
    file = open_file(path, ctx)
    assert isinstance(file, PageCacheFile)
    file._reads_nowait = reads_nowait
    io = file.native_io()
    assert io == ((file._fd, NativeKind.NOWAIT, 1, False) if reads_nowait else None)
    file.close()


def test_file_that_is_for_workers_only_is_so_natively(path: str, ctx: AioContext) -> None:
    for file in (
        PosixFiles(inline=False).open(path, read_only=False, direct=False, aio="native"),
        PosixFiles().open(path, read_only=False, direct=True, aio="threads"),
        MemoryFiles().open(path, read_only=False, direct=False, aio="native", create=True),
    ):
        assert file.native_io() is None
        file.close()


def test_memory_filesystem_is_native_and_durable(path: str, ctx: AioContext) -> None:
    fd = os.open(path, os.O_RDWR)
    file = MemoryFilesystemFile(fd, path, read_only=False)
    assert file.native_io() == (fd, NativeKind.INLINE, 1, True)
    file.close()


def test_direct_file_is_natively_durable_until_its_tail_is_written(
    path: str, ctx: AioContext
) -> None:
    file = open_file(path, ctx, direct=True, aio="native")
    assert isinstance(file, DirectFile)
    alignment = file.memory_alignment
    assert file.native_io() == (file._fd, NativeKind.AIO, alignment, True)
    ctx.run(file.write_tail(16 * BLOCK, memoryview(b"tail")))
    assert file.native_io() == (file._fd, NativeKind.AIO, alignment, False)
    file.close()


# Alignment


@pytest.mark.parametrize("needed", [512, 1024, 4096])
def test_alignment_is_found_by_trying(
    path: str, monkeypatch: pytest.MonkeyPatch, needed: int
) -> None:
    def picky(fd: int, buffers: Any, offset: int) -> int:
        if len(buffers[0]) % needed:
            raise OSError(errno.EINVAL, "unaligned")
        return len(buffers[0])

    monkeypatch.setattr(direct_alignment, "_ask_statx", lambda fd: None)
    monkeypatch.setattr(os, "preadv", picky)
    assert probe_direct_alignment(0, is_block_device=False) == (needed, needed)


def test_alignment_that_nobody_asks_for_is_4096(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_alignment, "_ask_statx", lambda fd: None)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: len(buffers[0]))
    assert probe_direct_alignment(0, is_block_device=False) == (4096, 4096)


def test_alignment_with_no_working_read_is_refused(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(direct_alignment, "_ask_statx", lambda fd: None)
    monkeypatch.setattr(os, "preadv", refuses)
    with pytest.raises(OSError, match="does not support O_DIRECT"):
        probe_direct_alignment(0, is_block_device=False)


# Space, where the filesystem can't


def test_write_zeroes_without_support_is_enotsup(
    path: str, ctx: AioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        def file_allocate(self, fd: int, mode: int, offset: int, length: int) -> int:
            return -errno.ENOSYS

    monkeypatch.setattr(blocking_io, "lib", Refuses())
    file = open_file(path, ctx)
    for unmap in (False, True):
        with pytest.raises(OSError) as caught:
            ctx.run(file.write_zeroes(0, BLOCK, unmap=unmap))
        assert (caught.value.errno, caught.value.filename) == (errno.ENOTSUP, path)
    ctx.run(file.discard(0, BLOCK))
    file.close()


# Real devices and full disks


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk"
    image.write_bytes(b"\xee" * (1 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
@pytest.mark.parametrize("direct", [False, True])
def test_block_device_reads_writes_zeroes_and_discards(
    loop_device: str, ctx: AioContext, direct: bool
) -> None:
    file = open_file(loop_device, ctx, direct=direct, aio="native")
    assert file.is_block_device
    # The node lies on devtmpfs, which looks like tmpfs; the device itself must be waited for.
    assert isinstance(file, DirectFile if direct else PageCacheFile)
    assert file.size_bytes() == 1 << 20
    assert file.request_alignment == (512 if direct else 1)
    view = Buffer(8 * BLOCK).view
    view[:BLOCK] = b"w" * BLOCK

    async def use() -> None:
        await file.write(BLOCK, view[:BLOCK])
        await file.write_zeroes(2 * BLOCK, BLOCK, unmap=False)
        await file.write_zeroes(3 * BLOCK, BLOCK, unmap=True)
        await file.discard(7 * BLOCK, BLOCK)
        await file.flush()
        assert await file.read(0, view) == 8 * BLOCK
        assert await file.extent_at(0) == (True, 1 << 20)
        with pytest.raises(OSError, match="keeps its size"):
            await file.truncate(BLOCK)
        with pytest.raises(OSError) as caught:
            await file.write_zeroes(1, 100, unmap=False)
        assert caught.value.errno == errno.ENOTSUP

    ctx.run(use())
    expected = b"\xee" * BLOCK + b"w" * BLOCK + bytes(2 * BLOCK) + b"\xee" * (3 * BLOCK)
    assert bytes(view[: 7 * BLOCK]) == expected
    file.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """A tmpfs of 1 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.strip()}")
    yield str(tmp_path)
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.root
def test_full_disk_is_enospc(small_disk: str, ctx: AioContext) -> None:
    file = open_file(f"{small_disk}/file", ctx, create=True)
    view = Buffer(2 << 20).view
    with pytest.raises(OSError) as caught:
        ctx.run(file.write(0, view))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as caught:
        ctx.run(file.allocate(0, 2 << 20))
    assert caught.value.errno == errno.ENOSPC
    file.close()
