# SPDX-License-Identifier: Apache-2.0
"""The direct map's twin in C: it says what the map says, and waits for what was taken from it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers import direct_map as direct_map_module
from blockemu.drivers import native_map as native_map_module
from blockemu.drivers._direct_map import ffi, lib
from blockemu.drivers.direct_map import WHOLE_DEVICE_BITS, DirectMap, TableWords
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.native_map import NativeMap
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Task
from blockemu.loop.file_engine import NativeIo, NativeKind
from blockemu.loop.host_file import PosixFiles
from tests.unit.drivers.native_poller import FakePoller

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "drivers" / "native"
PAGE = 65536
SIZE = 1 << 20


class Requests:
    """What the native connection does: pins, and posts the event when C says so."""

    def __init__(self, poller: FakePoller, native: NativeMap) -> None:
        self.poller = poller
        self.native = native

    def begin(self) -> Any:
        pin = ffi.new("struct map_pin *")
        lib.direct_map_pin(self.native.cdata, pin)
        return pin

    def end(self, pin: Any) -> bool:
        """Whether Python was told."""
        token = self.native.cdata.token
        told = lib.direct_map_unpin(self.native.cdata, pin) == 1
        if told:
            self.poller.post(token)
        return told


def make_map(
    *,
    page_bits: int = 16,
    length: int = 1 << 30,
    alignment: int = 1,
    durable: bool = False,
    kind: NativeKind | None = NativeKind.INLINE,
    file_durable: bool = True,
    words: TableWords | None = None,
) -> DirectMap:
    io = None if kind is None else NativeIo(7, kind, 512, file_durable)
    file: Any = SimpleNamespace(request_alignment=alignment, native_io=lambda: io)
    return DirectMap(file, page_bits=page_bits, length=length, durable=durable, words=words)


def twin_of(direct_map: DirectMap, poller: FakePoller | None = None) -> NativeMap:
    native = direct_map.native_handle(poller or FakePoller())
    assert native is not None
    return native


def find(native: NativeMap, offset: int, length: int, *, writable: bool = False) -> int:
    return lib.direct_map_find(native.cdata, offset, length, writable)


def finish(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs what has nothing to wait for."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def is_done(ctx: AioContext, task: Task[None]) -> bool:
    ctx.poll(blocking=False)
    return task.done()


def test_twin_is_made_once_and_knows_the_file() -> None:
    direct_map = make_map(alignment=512, length=10_000)
    poller = FakePoller()
    native = twin_of(direct_map, poller)
    assert direct_map.native_handle(poller) is native
    assert native.address == int(ffi.cast("uintptr_t", native.cdata))
    c = native.cdata
    assert (c.fd, c.io, c.page_bits, c.length) == (7, lib.MAP_IO_INLINE, 16, 9728)
    assert (c.alignment_mask, c.memory_mask, c.held, c.serial) == (511, 511, 0, 0)
    assert list(poller.callbacks) == [c.token]


def test_file_for_python_only_has_no_twin() -> None:
    assert make_map(kind=None).native_handle(FakePoller()) is None


def test_aio_file_has_a_twin_only_where_there_is_aio() -> None:
    poller = FakePoller(has_aio=False)
    assert make_map(kind=NativeKind.AIO).native_handle(poller) is None
    assert not poller.callbacks
    assert make_map(kind=NativeKind.AIO).native_handle(FakePoller()) is not None


def test_inline_file_does_not_ask_for_aio() -> None:
    poller = FakePoller(has_aio=False)
    twin_of(make_map(), poller)
    assert not poller.asked_for_aio


@pytest.mark.parametrize(
    ("asked", "file_durable", "length", "expected"),
    [(True, True, 1024, 1), (False, True, 1024, 0), (True, False, 1024, 0), (True, True, 1025, 0)],
)
def test_durable_only_where_all_agree_and_the_end_is_aligned(
    asked: bool, file_durable: bool, length: int, expected: int
) -> None:
    direct_map = make_map(
        alignment=512,
        length=length,
        durable=asked,
        file_durable=file_durable,
        kind=NativeKind.AIO,
    )
    assert twin_of(direct_map).cdata.durable == expected


Change = tuple[str, int, int, bool]

pages = st.integers(0, 40)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), pages, pages, st.booleans()),
        st.tuples(st.just("run"), pages, st.integers(1, 12), st.booleans()),
        st.tuples(st.just("invalidate"), pages, st.integers(1, 60), st.booleans()),
        st.tuples(st.sampled_from(["hold", "release", "twin"]), pages, pages, st.booleans()),
    ),
    max_size=40,
)


def apply(direct_map: DirectMap, change: Change, size: int) -> None:
    kind, first, second, flag = change
    if kind == "publish":
        direct_map.publish(first * size, second * size, writable=flag)
    elif kind == "run":
        for page in range(first, first + second):
            direct_map.publish(page * size, (page + 3) * size, writable=flag or page % 4 != 0)
    elif kind == "invalidate":
        finish(direct_map.invalidate(first * size + (size > 1 and flag), second * size))
    elif kind == "hold":
        direct_map.hold()


@given(
    data=st.data(),
    page_bits=st.sampled_from([0, 1, 9, 16, 40]),
    alignment=st.sampled_from([1, 512]),
    pages_max=st.sampled_from([3, 30, 1000]),
    steps=changes,
)
def test_twin_finds_what_the_map_finds(
    data: st.DataObject, page_bits: int, alignment: int, pages_max: int, steps: list[Change]
) -> None:
    size = 1 << page_bits
    length = data.draw(st.sampled_from([38 * size, 60 * size - 1, 60 * size]))
    direct_map = make_map(page_bits=page_bits, length=length, alignment=alignment)
    poller = FakePoller()
    held = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_map_module, "PAGES_MAX", pages_max)
        for step in steps:
            if step[0] == "release" and held:
                held -= 1
                direct_map.release()
            held += step[0] == "hold"
            apply(direct_map, step, size)
            if step[0] == "twin":
                twin_of(direct_map, poller)
        native = twin_of(direct_map, poller)
        assert len(native) == len(direct_map)
        near = st.builds(
            lambda page, inside: max(page * size + inside, 0),
            st.integers(0, 61),
            st.sampled_from([-alignment, 0, alignment, size // 2, 1]),
        )
        for _ in range(20):
            offset = data.draw(near | st.integers(0, 2**64 - 1))
            count = data.draw(near | st.integers(1, 2**32)) or 1
            assert find(native, offset, count) == direct_map.lookup_read(offset, count)
            assert find(native, offset, count, writable=True) == direct_map.lookup_write(
                offset, count
            )


@given(offset=st.integers(0, 2**64 - 1), length=st.integers(1, 2**64 - 1))
def test_whole_device_in_one_page(offset: int, length: int) -> None:
    direct_map = make_map(page_bits=WHOLE_DEVICE_BITS, length=1 << 40, alignment=512)
    direct_map.publish(0, 1 << 20, writable=True)
    native = twin_of(direct_map)
    for start, count in ((offset, length), (offset & (2**40 - 512), (length & 2**20) or 512)):
        assert find(native, start, count, writable=True) == direct_map.lookup_write(start, count)


def test_map_of_many_pages_is_bounded_and_full_map_gives_memory_back() -> None:
    direct_map = make_map(page_bits=9, length=1 << 62)
    native = twin_of(direct_map)
    for page in range(direct_map_module.PAGES_MAX):
        direct_map.publish(page << 9, page << 9, writable=True)
    assert len(native) == len(direct_map) == direct_map_module.PAGES_MAX
    assert native.cdata.pages.capacity == 2 * direct_map_module.PAGES_MAX
    direct_map.publish(1 << 60, 512, writable=True)
    assert len(native) == len(direct_map) == 1
    assert native.cdata.pages.capacity <= 16
    assert find(native, 1 << 60, 512) == 512


def test_pages_that_collide_are_never_wrong_and_soon_misses() -> None:
    # Guests choose which pages are published: all of these have one home slot up to 1024 slots.
    colliding = [p for p in range(1 << 19) if (p * 0x9E3779B97F4A7C15 & (2**64 - 1)) >> 54 == 0]
    assert len(colliding) > 400
    direct_map = make_map(page_bits=9, length=1 << 62)
    native = twin_of(direct_map)
    chosen = colliding[:400]
    for page in chosen:
        direct_map.publish(page << 9, page << 9, writable=True)
    assert 128 <= len(native) < len(direct_map) == 400
    hits = [page for page in chosen if find(native, page << 9, 512) != -1]
    assert len(hits) == len(native)
    assert all(find(native, page << 9, 512) == page << 9 for page in hits)
    for page in chosen:
        finish(direct_map.invalidate(page << 9, 512))
    assert len(native) == 0


def test_held_map_has_a_held_twin_even_if_that_is_made_then() -> None:
    direct_map = make_map()
    direct_map.publish(0, PAGE, writable=True)
    direct_map.hold()
    native = twin_of(direct_map)
    assert find(native, 0, 512) == -1
    direct_map.hold()
    direct_map.release()
    assert find(native, 0, 512) == -1
    direct_map.release()
    assert find(native, 0, 512) == PAGE


def test_wait_ends_with_the_last_request_that_was_under_way_at_its_call(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    requests = Requests(poller, twin_of(direct_map, poller))
    first, second = requests.begin(), requests.begin()
    task = ctx.spawn(direct_map.wait_idle())
    later = requests.begin()
    assert not is_done(ctx, task)
    assert not requests.end(second)
    assert not is_done(ctx, task)
    assert requests.end(first)
    assert is_done(ctx, task)
    assert not requests.end(later), "nobody waits any more"


def test_wait_of_a_map_without_requests_is_over_at_once(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    requests = Requests(poller, twin_of(direct_map, poller))
    requests.end(requests.begin())
    finish(direct_map.wait_idle())


def test_waits_of_two_are_told_one_after_the_other(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    requests = Requests(poller, twin_of(direct_map, poller))
    old = requests.begin()
    first = ctx.spawn(direct_map.wait_idle())
    ctx.poll(blocking=False)
    new = requests.begin()
    second = ctx.spawn(direct_map.wait_idle())
    assert not is_done(ctx, second)
    assert requests.end(old)
    assert is_done(ctx, first)
    assert not second.done()
    assert requests.end(new)
    assert is_done(ctx, second)


def test_wait_goes_on_after_another_was_cancelled(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    requests = Requests(poller, twin_of(direct_map, poller))
    old = requests.begin()
    given_up = ctx.spawn(direct_map.wait_idle())
    ctx.poll(blocking=False)
    new = requests.begin()
    task = ctx.spawn(direct_map.wait_idle())
    ctx.poll(blocking=False)
    given_up.cancel()
    assert is_done(ctx, given_up)
    requests.end(old)
    assert not is_done(ctx, task)
    requests.end(new)
    assert is_done(ctx, task)


def test_wait_covers_python_and_native_requests_from_its_call_on(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    requests = Requests(poller, twin_of(direct_map, poller))
    python, native = direct_map.pin(), requests.begin()
    task = ctx.spawn(direct_map.invalidate(0, PAGE))
    assert not is_done(ctx, task)
    later = requests.begin()
    direct_map.unpin(python)
    assert not is_done(ctx, task)
    requests.end(native)
    assert is_done(ctx, task)
    requests.end(later)


def test_closed_map_waits_then_misses_for_ever(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    direct_map.publish(0, 0, writable=True)
    native = twin_of(direct_map, poller)
    requests = Requests(poller, native)
    pin = requests.begin()
    direct_map.hold()  # by a drained section around it
    task = ctx.spawn(direct_map.close())
    assert not is_done(ctx, task)
    assert find(native, 0, 512) == -1
    requests.end(pin)
    assert is_done(ctx, task)
    direct_map.release()
    direct_map.publish(PAGE, PAGE, writable=True)
    assert direct_map.lookup_read(0, 512) == -1
    assert find(native, 0, 512) == find(native, PAGE, 512) == -1
    assert not poller.callbacks
    assert direct_map.native_handle(poller) is None


def test_close_that_is_cancelled_leaves_the_map_as_it_was(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    direct_map.publish(0, PAGE, writable=True)
    native = twin_of(direct_map, poller)
    requests = Requests(poller, native)
    pin = requests.begin()
    task = ctx.spawn(direct_map.close())
    ctx.poll(blocking=False)
    task.cancel()
    assert is_done(ctx, task)
    assert direct_map.lookup_read(0, 512) == find(native, 0, 512) == PAGE
    requests.end(pin)


def test_map_closed_twice_at_a_time_is_closed(ctx: AioContext) -> None:
    direct_map, poller = make_map(), FakePoller()
    requests = Requests(poller, twin_of(direct_map, poller))
    pin = requests.begin()
    tasks = [ctx.spawn(direct_map.close()) for _ in range(2)]
    ctx.poll(blocking=False)
    requests.end(pin)
    assert all(is_done(ctx, task) for task in tasks)
    assert not poller.callbacks


def test_detached_map_gets_a_new_twin_in_its_next_context() -> None:
    direct_map, old_poller, poller = make_map(), FakePoller(), FakePoller()
    direct_map.publish(0, PAGE, writable=True)
    direct_map.hold()
    old = twin_of(direct_map, old_poller)
    direct_map.detach()
    direct_map.release()
    assert not old_poller.callbacks
    assert find(old, 0, 512) == -1
    assert find(twin_of(direct_map, poller), 0, 512) == PAGE


def test_memory_outlives_the_map_and_goes_with_the_last_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[int] = []

    def close(opened: Any) -> None:
        closed.append(int(ffi.cast("uintptr_t", opened)))
        lib.direct_map_close(opened)

    watched = SimpleNamespace(**{name: getattr(lib, name) for name in dir(lib)})
    watched.direct_map_close = close
    monkeypatch.setattr(native_map_module, "lib", watched)
    direct_map, poller = make_map(), FakePoller()
    native: NativeMap | None = twin_of(direct_map, poller)
    assert native is not None
    address = native.address
    direct_map.detach()
    del direct_map
    gc.collect()
    assert address not in closed
    assert find(native, 0, 512) == -1
    native = None
    gc.collect()
    assert closed.count(address) == 1


def test_map_that_is_lost_with_requests_under_way_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native = twin_of(make_map())
    requests = Requests(FakePoller(), native)
    pin = requests.begin()
    cdata = native.cdata
    closed: list[Any] = []
    watched = SimpleNamespace(**{name: getattr(lib, name) for name in dir(lib)})
    watched.direct_map_close = closed.append
    monkeypatch.setattr(native_map_module, "lib", watched)
    native_map_module._close(cdata)
    assert not closed
    requests.end(pin)
    native_map_module._close(cdata)
    assert closed == [cdata]


# --- of drivers ---


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


def open_node(ctx: AioContext, options: dict[str, Any]) -> BlockDriverState:
    return ctx.run(Opener(files=PosixFiles(), ctx=ctx).open(options))


def twin_of_node(node: BlockDriverState, poller: FakePoller) -> NativeMap:
    direct_map = node.driver.direct_map()
    assert direct_map is not None
    return twin_of(direct_map, poller)


def file_options(image: Path, *, no_flush: bool = False) -> dict[str, Any]:
    cache = {"direct": True, "no-flush": no_flush}
    return {"driver": "file", "filename": str(image), "cache": cache}


@pytest.mark.parametrize("driver", ["file", "raw"])
def test_close_of_a_node_retires_the_twin_before_the_descriptor(
    ctx: AioContext, image: Path, driver: str
) -> None:
    options = file_options(image)
    node = open_node(ctx, options if driver == "file" else {"driver": "raw", "file": options})
    poller = FakePoller()
    native = twin_of_node(node, poller)
    assert native.cdata.durable == 1
    requests = Requests(poller, native)
    pin = requests.begin()
    fd = native.cdata.fd
    task = ctx.spawn(node.close())
    assert not is_done(ctx, task)
    os.fstat(fd)
    requests.end(pin)
    assert is_done(ctx, task)
    assert find(native, 0, 4096) == -1
    assert not poller.callbacks


def test_drained_section_waits_for_native_requests(ctx: AioContext, image: Path) -> None:
    node = open_node(ctx, {"driver": "raw", "file": file_options(image)})
    poller = FakePoller()
    native = twin_of_node(node, poller)
    requests = Requests(poller, native)
    pin = requests.begin()
    section = DrainedSection(node)
    task = ctx.spawn(section.begin())
    assert not is_done(ctx, task)
    assert find(native, 0, 4096) == -1
    requests.end(pin)
    assert is_done(ctx, task)
    section.leave_context()
    section.end()
    assert find(native, 0, 4096) == 0
    ctx.run(node.close())


def test_truncated_raw_has_a_new_twin(ctx: AioContext, image: Path) -> None:
    node = open_node(ctx, {"driver": "raw", "file": file_options(image)})
    poller = FakePoller()
    old = twin_of_node(node, poller)
    ctx.run(node.truncate(SIZE // 2))
    assert find(old, 0, 4096) == -1
    new = twin_of_node(node, poller)
    assert new is not old
    assert new.cdata.length == SIZE // 2
    ctx.run(node.close())
    assert not poller.callbacks


def test_detach_from_the_context_retires_twins_of_the_formats_above(
    ctx: AioContext, image: Path
) -> None:
    node = open_node(ctx, {"driver": "raw", "file": file_options(image)})
    poller = FakePoller()
    native = twin_of_node(node, poller)
    for each in node.subtree():
        each.driver.detach_aio_context()
    assert not poller.callbacks
    assert find(native, 0, 4096) == -1
    for each in node.subtree():
        each.driver.attach_aio_context(ctx)
    assert find(twin_of_node(node, poller), 0, 4096) == 0
    ctx.run(node.close())


def test_flushes_that_are_to_be_forgotten_are_left_to_python(ctx: AioContext, image: Path) -> None:
    node = open_node(ctx, file_options(image, no_flush=True))
    assert twin_of_node(node, FakePoller()).cdata.durable == 0
    ctx.run(node.close())


def test_c_part_keeps_its_contract_under_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "harness"
    flags = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build = subprocess.run(
        [compiler, *flags, *sanitizers, str(HERE / "direct_map_harness.c"), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in build.stderr and "san" in build.stderr:
        pytest.skip("the compiler has no sanitizers installed")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=30)
    assert run.returncode == 0, run.stdout + run.stderr
