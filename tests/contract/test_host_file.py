# SPDX-License-Identifier: Apache-2.0
"""What every host file promises, whichever engine opened it.

Engines: page cache on a disk filesystem (with reads on the spot, and with workers only), page cache
on tmpfs, the same two for copying (bulk), O_DIRECT by Linux AIO and by workers, and memory (at
once, and with latency on a virtual clock). An engine that this machine's filesystems can't have is
skipped with the reason.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockemu.loop.aio_context import AioContext
from blockemu.loop.buffers import Buffer
from blockemu.loop.clock import VirtualClock
from blockemu.loop.coroutine import Future
from blockemu.loop.host_file import FileEngine, HostFile, PosixFiles
from blockemu.loop.memory_file import MemoryFiles
from blockemu.loop.page_cache_file import MemoryFilesystemFile
from blockemu.loop.poller import MemoryPoller
from blockemu.loop.sync import gather

BLOCK = 4096
ENGINES = [
    "page-cache",
    "page-cache-workers",
    "page-cache-tmpfs",
    "page-cache-bulk",
    "page-cache-bulk-tmpfs",
    "direct-native",
    "direct-native-io-getevents",
    "direct-threads",
    "memory",
    "memory-latency",
]


@dataclass
class Bench:
    """An engine, a context, and a place for files."""

    ctx: AioContext
    engine: FileEngine
    folder: str
    direct: bool
    aio: str
    latency: bool = False

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def make(self, name: str, content: bytes) -> str:
        """A file with this content, made behind the engine's back."""
        path = self.path(name)
        if isinstance(self.engine, MemoryFiles):
            image = self.engine.add(path, content)
            if self.latency:
                image.latency_ns = lambda kind, offset, length: 1000 + offset % 7
        else:
            Path(path).write_bytes(content)
        return path

    def content(self, name: str) -> bytes:
        path = self.path(name)
        if isinstance(self.engine, MemoryFiles):
            return bytes(self.engine.images[path].content)
        return Path(path).read_bytes()

    def open(self, path: str, *, read_only: bool = False, create: bool = False) -> HostFile:
        file = self.engine.open(
            path, read_only=read_only, direct=self.direct, aio=self.aio, create=create
        )
        file.attach(self.ctx)
        return file


@pytest.fixture(params=ENGINES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    name: str = request.param
    if name.startswith("memory"):
        clock = VirtualClock()
        ctx = AioContext("test", clock=clock, poller=MemoryPoller(clock))
        yield Bench(ctx, MemoryFiles(), "/memory", False, "threads", name == "memory-latency")
        ctx.close()
        return
    folder = _folder_on("tmpfs" if name.endswith("tmpfs") else "disk", tmp_path)
    ctx = AioContext("test")
    if name.endswith("io-getevents"):
        _forbid_user_ring(ctx, request)
    bench = Bench(
        ctx,
        PosixFiles(inline=name != "page-cache-workers", bulk="bulk" in name),
        folder,
        direct=name.startswith("direct"),
        aio="native" if "native" in name else "threads",
    )
    try:
        if bench.direct:
            _skip_without_direct(bench)
        yield bench
    finally:
        ctx.close()
        shutil.rmtree(folder)


def _folder_on(kind: str, tmp_path: Path) -> str:
    """A new folder on a filesystem of this kind."""
    places = ["/dev/shm"] if kind == "tmpfs" else [str(tmp_path), "/var/tmp", os.getcwd()]
    for place in places:
        folder = tempfile.mkdtemp(dir=place)
        probe = Path(folder, "probe")
        probe.write_bytes(b"x")
        file = PosixFiles().open(str(probe), read_only=True, direct=False, aio="threads")
        file.close()
        probe.unlink()
        if isinstance(file, MemoryFilesystemFile) == (kind == "tmpfs"):
            return folder
        shutil.rmtree(folder)
    pytest.skip(f"no folder on {kind} here")


def _forbid_user_ring(ctx: AioContext, request: pytest.FixtureRequest) -> None:
    from blockemu.loop.linux_aio import LinuxAio

    ctx._linux_aio = LinuxAio(ctx, user_ring=False)
    ctx._linux_aio_tried = True


def _skip_without_direct(bench: Bench) -> None:
    path = bench.make("probe", bytes(BLOCK))
    try:
        bench.open(path).close()
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip(f"no O_DIRECT in {bench.folder}")
        raise


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def aligned(content: bytes) -> memoryview:
    """Page-aligned memory with this content."""
    view = Buffer(max(1, -(-len(content) // BLOCK)) * BLOCK).view[: len(content)]
    view[:] = content
    return view


async def finish(start: Callable[..., int | None], offset: int, view: memoryview) -> int:
    """One request by the callback interface."""
    future: Future[int] = Future(shielded=True)
    result = start(offset, view, future.set_result)
    return await future if result is None else result


# Reading


def test_read_returns_content(bench: Bench) -> None:
    content = pattern(16 * BLOCK)
    file = bench.open(bench.make("a", content))
    view = aligned(bytes(3 * BLOCK))
    assert bench.ctx.run(file.read(5 * BLOCK, view)) == 3 * BLOCK
    assert view == content[5 * BLOCK : 8 * BLOCK]
    file.close()


def test_start_read_returns_content(bench: Bench) -> None:
    content = pattern(4 * BLOCK)
    file = bench.open(bench.make("a", content))
    view = aligned(bytes(BLOCK))
    assert bench.ctx.run(finish(file.start_read, 2 * BLOCK, view)) == BLOCK
    assert view == content[2 * BLOCK : 3 * BLOCK]
    file.close()


def test_read_into_unaligned_memory_bounces(bench: Bench) -> None:
    content = pattern(2 * BLOCK)
    file = bench.open(bench.make("a", content))
    view = aligned(bytes(2 * BLOCK))[1 : BLOCK + 1]
    assert bench.ctx.run(file.read(BLOCK, view)) == BLOCK
    assert view == content[BLOCK:]
    file.close()


@pytest.mark.parametrize("tail", [0, 1, 511, 513, 4095])
def test_read_across_end_is_short(bench: Bench, tail: int) -> None:
    content = pattern(2 * BLOCK + tail)
    file = bench.open(bench.make("a", content))
    view = aligned(b"\xaa" * (3 * BLOCK))
    assert bench.ctx.run(file.read(BLOCK, view)) == BLOCK + tail
    assert view[: BLOCK + tail] == content[BLOCK:]
    assert bench.ctx.run(finish(file.start_read, BLOCK, view)) == BLOCK + tail
    file.close()


def test_read_behind_end_returns_0(bench: Bench) -> None:
    file = bench.open(bench.make("a", pattern(BLOCK + 7)))
    assert bench.ctx.run(file.read(8 * BLOCK, aligned(bytes(BLOCK)))) == 0
    file.close()


def test_read_of_empty_file_returns_0(bench: Bench) -> None:
    file = bench.open(bench.make("a", b""))
    assert file.size_bytes() == 0
    assert bench.ctx.run(file.read(0, aligned(bytes(BLOCK)))) == 0
    file.close()


def test_read_of_cold_file_returns_content(bench: Bench) -> None:
    content = pattern(64 * BLOCK)
    path = bench.make("a", content)
    if not isinstance(bench.engine, MemoryFiles):
        with open(path, "r+b") as plain:
            os.fsync(plain.fileno())
            os.posix_fadvise(plain.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(plain.fileno(), [bytearray(1)], 20 * BLOCK)  # some of it is warm
    file = bench.open(path)
    view = aligned(bytes(64 * BLOCK))
    assert bench.ctx.run(file.read(0, view)) == 64 * BLOCK
    assert view == content
    file.close()


def test_write_to_read_only_file_reports_ebadf_and_name(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(BLOCK)), read_only=True)
    view = aligned(bytes(BLOCK))
    with pytest.raises(OSError) as caught:
        bench.ctx.run(file.write(0, view))
    assert caught.value.errno == errno.EBADF
    assert caught.value.filename == file.path
    file.close()


# Writing


def test_write_then_read_returns_it(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(8 * BLOCK)))
    content = pattern(2 * BLOCK)
    bench.ctx.run(file.write(3 * BLOCK, aligned(content)))
    assert bench.content("a") == bytes(3 * BLOCK) + content + bytes(3 * BLOCK)
    view = aligned(bytes(2 * BLOCK))
    assert bench.ctx.run(file.read(3 * BLOCK, view)) == 2 * BLOCK
    assert view == content
    file.close()


def test_start_write_returns_length(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(BLOCK)))
    content = pattern(BLOCK)
    assert bench.ctx.run(finish(file.start_write, 0, aligned(content))) == BLOCK
    assert bench.content("a") == content
    file.close()


def test_write_from_unaligned_read_only_memory_bounces(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(2 * BLOCK)))
    content = pattern(BLOCK + 3)
    bench.ctx.run(file.write(BLOCK, memoryview(content)[3:]))
    assert bench.content("a") == bytes(BLOCK) + content[3:]
    file.close()


def test_write_behind_end_makes_file_grow(bench: Bench) -> None:
    file = bench.open(bench.make("a", pattern(BLOCK)))
    content = pattern(BLOCK, seed=2)
    bench.ctx.run(file.write(3 * BLOCK, aligned(content)))
    assert file.size_bytes() == 4 * BLOCK
    assert bench.content("a") == pattern(BLOCK) + bytes(2 * BLOCK) + content
    file.close()


def test_writes_inline_never_stays_pending(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(BLOCK)))
    called: list[int] = []
    result = file.start_write(0, aligned(bytes(BLOCK)), called.append)
    if result is not None:
        assert result == BLOCK
        assert called == []
    else:
        assert not file.writes_inline
        while not called:
            bench.ctx.poll(blocking=True)
        assert called == [BLOCK]
    file.close()


def test_write_tail_takes_any_length(bench: Bench) -> None:
    file = bench.open(bench.make("a", pattern(BLOCK)))
    bench.ctx.run(file.write_tail(BLOCK, memoryview(b"the end")))
    assert file.size_bytes() == BLOCK + 7
    view = aligned(bytes(2 * BLOCK))
    assert bench.ctx.run(file.read(0, view)) == BLOCK + 7
    assert view[: BLOCK + 7] == pattern(BLOCK) + b"the end"
    bench.ctx.run(file.flush())
    file.close()


def test_many_requests_at_once_all_finish(bench: Bench) -> None:
    """More than the ring, the slots and the pool can hold."""
    count = 600
    file = bench.open(bench.make("a", bytes(count * BLOCK)))
    content = pattern(count * BLOCK)
    source = aligned(content)

    async def writes() -> None:
        await gather(
            *(file.write(at, source[at : at + BLOCK]) for at in range(0, count * BLOCK, BLOCK))
        )

    bench.ctx.run(writes())
    assert bench.content("a") == content
    target = aligned(bytes(count * BLOCK))
    results: list[int] = []
    for at in range(0, count * BLOCK, BLOCK):
        result = file.start_read(at, target[at : at + BLOCK], results.append)
        if result is not None:
            results.append(result)
    while len(results) < count:
        bench.ctx.poll(blocking=True)
    assert set(results) == {BLOCK}
    assert target == content
    file.close()


def test_large_request_moves_all(bench: Bench) -> None:
    length = 3 << 20
    file = bench.open(bench.make("a", b""))
    content = pattern(length)
    bench.ctx.run(file.write(0, aligned(content)))
    view = aligned(bytes(length))
    assert bench.ctx.run(file.read(0, view)) == length
    assert view == content
    file.close()


def test_flush_of_written_data_returns(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(BLOCK)))

    async def flushes() -> None:
        await file.write(0, aligned(pattern(BLOCK)))
        await gather(*(file.flush() for _ in range(5)))

    bench.ctx.run(flushes())
    file.close()


def test_flush_of_read_only_file_returns(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(BLOCK)), read_only=True)
    bench.ctx.run(file.flush())
    file.close()


# Space


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes_reads_as_zeroes(bench: Bench, unmap: bool) -> None:
    content = pattern(8 * BLOCK)
    file = bench.open(bench.make("a", content))
    bench.ctx.run(file.write_zeroes(2 * BLOCK, 3 * BLOCK, unmap=unmap))
    assert bench.content("a") == content[: 2 * BLOCK] + bytes(3 * BLOCK) + content[5 * BLOCK :]
    file.close()


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("start", [0, 2, 4])
def test_write_zeroes_across_end_makes_file_grow(bench: Bench, unmap: bool, start: int) -> None:
    content = pattern(3 * BLOCK)
    file = bench.open(bench.make("a", content))
    bench.ctx.run(file.write_zeroes(start * BLOCK, 4 * BLOCK, unmap=unmap))
    kept = content[: start * BLOCK]
    assert bench.content("a") == kept + bytes((start + 4) * BLOCK - len(kept))
    file.close()


def test_discard_keeps_length_and_neighbours(bench: Bench) -> None:
    content = pattern(8 * BLOCK)
    file = bench.open(bench.make("a", content))
    bench.ctx.run(file.discard(2 * BLOCK, 3 * BLOCK))
    after = bench.content("a")
    assert len(after) == 8 * BLOCK
    assert after[: 2 * BLOCK] == content[: 2 * BLOCK]
    assert after[5 * BLOCK :] == content[5 * BLOCK :]
    file.close()


def test_discard_behind_end_does_nothing(bench: Bench) -> None:
    file = bench.open(bench.make("a", pattern(BLOCK)))
    bench.ctx.run(file.discard(4 * BLOCK, BLOCK))
    assert bench.content("a") == pattern(BLOCK)
    file.close()


def test_truncate_shrinks_and_grows_with_zeroes(bench: Bench) -> None:
    file = bench.open(bench.make("a", pattern(4 * BLOCK)))
    bench.ctx.run(file.truncate(BLOCK + 5))
    bench.ctx.run(file.truncate(2 * BLOCK))
    assert bench.content("a") == pattern(4 * BLOCK)[: BLOCK + 5] + bytes(BLOCK - 5)
    assert file.size_bytes() == 2 * BLOCK
    file.close()


def test_allocate_makes_file_grow_and_keeps_content(bench: Bench) -> None:
    file = bench.open(bench.make("a", pattern(BLOCK)))
    bench.ctx.run(file.allocate(0, 4 * BLOCK))
    assert bench.content("a") == pattern(BLOCK) + bytes(3 * BLOCK)
    file.close()


def test_extent_at_finds_hole_between_data(bench: Bench) -> None:
    step = 1 << 16  # holes are found at the granularity of the filesystem's blocks
    file = bench.open(bench.make("a", b""))

    async def extents() -> list[tuple[bool, int]]:
        await file.truncate(4 * step)
        await file.write(step, aligned(pattern(step)))
        return [await file.extent_at(at) for at in (0, step, 2 * step, step + 512, 4 * step)]

    assert bench.ctx.run(extents()) == [
        (False, step),
        (True, step),
        (False, 2 * step),
        (True, step - 512),
        (False, 0),
    ]
    file.close()


def test_extent_at_of_discarded_range_is_hole(bench: Bench) -> None:
    step = 1 << 16
    file = bench.open(bench.make("a", pattern(3 * step)))
    bench.ctx.run(file.discard(step, step))
    assert bench.ctx.run(file.extent_at(step)) == (False, step)
    assert bench.ctx.run(file.extent_at(0)) == (True, step)
    file.close()


# Locks


def test_shared_locks_of_two_opens_coexist(bench: Bench) -> None:
    path = bench.make("a", bytes(BLOCK))
    one, two = bench.open(path), bench.open(path)
    one.lock_byte(100)
    two.lock_byte(100)
    assert not two.byte_is_locked(100, exclusive=False)
    assert two.byte_is_locked(100, exclusive=True)
    one.close()
    two.close()


def test_exclusive_lock_excludes_other_open(bench: Bench) -> None:
    path = bench.make("a", bytes(BLOCK))
    one, two = bench.open(path), bench.open(path)
    one.lock_byte(100, exclusive=True)
    with pytest.raises(OSError) as caught:
        two.lock_byte(100)
    assert caught.value.errno in (errno.EAGAIN, errno.EACCES)
    assert caught.value.filename == path
    assert two.byte_is_locked(100, exclusive=False)
    assert not two.byte_is_locked(101, exclusive=True)
    one.close()
    two.close()


def test_unlock_and_close_give_locks_back(bench: Bench) -> None:
    path = bench.make("a", bytes(BLOCK))
    one, two, three = bench.open(path), bench.open(path), bench.open(path)
    one.lock_byte(100, exclusive=True)
    two.lock_byte(101, exclusive=True)
    one.unlock_byte(100)
    two.close()
    assert not three.byte_is_locked(100, exclusive=True)
    assert not three.byte_is_locked(101, exclusive=True)
    assert not one.byte_is_locked(100, exclusive=True)
    one.close()
    three.close()


# Opening, and what a file says of itself


def test_open_of_missing_file_names_it(bench: Bench) -> None:
    path = bench.path("missing")
    with pytest.raises(FileNotFoundError) as caught:
        bench.open(path)
    assert caught.value.filename == path


def test_open_with_create_makes_it_and_empties_nothing(bench: Bench) -> None:
    path = bench.path("new")
    file = bench.open(path, create=True)
    bench.ctx.run(file.write(0, aligned(pattern(BLOCK))))
    file.close()
    again = bench.open(path, create=True)
    assert again.size_bytes() == BLOCK
    again.close()


def test_properties_describe_the_file(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(BLOCK)), read_only=True)
    assert file.read_only
    assert file.direct == bench.direct
    assert not file.is_block_device
    assert file.path == bench.path("a")
    for alignment in (file.request_alignment, file.memory_alignment):
        assert alignment & (alignment - 1) == 0
        assert 1 <= alignment <= BLOCK
        assert bench.direct or alignment == 1
    file.close()


def test_close_twice_is_fine(bench: Bench) -> None:
    file = bench.open(bench.make("a", bytes(BLOCK)))
    file.close()
    file.close()


def test_detach_and_attach_moves_file_to_other_context(bench: Bench) -> None:
    file = bench.open(bench.make("a", pattern(BLOCK)))
    view = aligned(bytes(BLOCK))
    bench.ctx.run(file.read(0, view))
    file.detach()
    if isinstance(bench.engine, MemoryFiles):
        clock = VirtualClock()
        other = AioContext("other", clock=clock, poller=MemoryPoller(clock))
    else:
        other = AioContext("other")
    file.attach(other)
    view[:] = bytes(BLOCK)
    assert other.run(file.read(0, view)) == BLOCK
    assert view == pattern(BLOCK)
    file.close()
    other.close()


def test_cancelled_read_ends_after_the_transfer(bench: Bench) -> None:
    """The engine may write into the memory until then."""
    file = bench.open(bench.make("a", pattern(BLOCK)))
    view = aligned(bytes(BLOCK))
    task = bench.ctx.spawn(file.read(0, view))
    task.cancel()
    while not task.done():
        bench.ctx.poll(blocking=True)
    assert view == pattern(BLOCK)
    file.close()
