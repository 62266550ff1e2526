# SPDX-License-Identifier: Apache-2.0
"""Images with an external data file: what goes where, and what is refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import Role
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.header import Extension, first_cluster_bytes, parse
from blockemu.drivers.qcow2.layout import COPIED
from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.loop.coroutine import run_in_context
from blockemu.loop.iothread import IOThread
from blockemu.loop.poller import MemoryPoller
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 4 * KIB
DISK_BYTES = MIB + 512
NAME = 0x44415441


@pytest.fixture(params=[False, True], ids=["mapped", "raw"])
def raw(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def make(images: Images, *, raw: bool = False, **options: Any) -> Disk:
    options = {"cluster_size": CLUSTER, **options}
    images.create("image", DISK_BYTES, data_file="data", data_file_raw=raw, **options)
    return images.open("image")


def entries(images: Images) -> list[int]:
    """The first L2 table in the file."""
    content = images["image"].content
    l1 = int.from_bytes(content[40:48], "big")
    table = int.from_bytes(content[l1 : l1 + 8], "big") & ~COPIED
    words = content[table : table + CLUSTER]
    return [int.from_bytes(words[at : at + 8], "big") for at in range(0, CLUSTER, 8)]


def set_entry(images: Images, index: int, word: int) -> None:
    content = images["image"].content
    l1 = int.from_bytes(content[40:48], "big")
    table = int.from_bytes(content[l1 : l1 + 8], "big") & ~COPIED
    content[table + 8 * index : table + 8 * index + 8] = word.to_bytes(8, "big")


def rename(images: Images, name: bytes) -> None:
    content = images["image"].content
    header = parse("image", bytes(content[: first_cluster_bytes("image", content)]))
    header.extensions = [
        Extension(NAME, name) if found.kind == NAME else found for found in header.extensions
    ]
    content[:CLUSTER] = header.serialise("image").ljust(CLUSTER, b"\0")


def reason(images: Images, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        images.open("image", **options)
    assert not images.opener.nodes
    return str(caught.value)


# --- where things lie ---


def test_guest_bytes_lie_in_the_data_file_at_their_own_offset(images: Images, raw: bool) -> None:
    disk = make(images, raw=raw)
    disk.write(5 * CLUSTER + 100, b"hello")
    disk.write(DISK_BYTES - 4, b"last")
    disk.close()
    data = images["data"].content
    assert data[5 * CLUSTER + 100 : 5 * CLUSTER + 105] == b"hello"
    assert data[-4:] == b"last"
    assert len(data) == DISK_BYTES
    assert b"hello" not in images["image"].content


def test_guest_cluster_0_is_mapped_by_the_copied_flag_alone(images: Images, raw: bool) -> None:
    disk = make(images, raw=raw)
    disk.write(0, b"first")
    disk.close()
    assert entries(images)[0] == COPIED
    disk = images.open("image", read_only=True)
    assert disk.read(0, 5) == b"first"


def test_new_raw_data_file_has_all_clusters_mapped(images: Images) -> None:
    make(images, raw=True).close()
    assert entries(images)[:257] == [COPIED | index * CLUSTER for index in range(257)]


def test_unmapped_cluster_reads_as_zeroes_whatever_the_data_file_holds(images: Images) -> None:
    disk = make(images)
    images["data"].apply("write", 0, 2 * CLUSTER, memoryview(b"x" * (2 * CLUSTER)))
    assert disk.read(0, CLUSTER) == bytes(CLUSTER)
    disk.write(CLUSTER + 10, b"new")
    assert disk.read(CLUSTER, CLUSTER) == b"new".rjust(13, b"\0").ljust(CLUSTER, b"\0")


def test_write_into_a_hole_of_the_data_file_writes_no_more_than_it_must(images: Images) -> None:
    disk = make(images)
    images["data"].log.clear()
    disk.write(8 * CLUSTER + 512, b"x" * 512)
    writes = images["data"].operations("write")
    assert [(found.offset, found.length) for found in writes] == [(8 * CLUSTER + 512, 512)]


def test_discarded_cluster_gives_its_space_back_and_reads_as_zeroes(
    images: Images, raw: bool
) -> None:
    disk = make(images, raw=raw)
    disk.write(0, b"x" * (4 * CLUSTER))
    disk.ctx.run(disk.node.pdiscard(0, 2 * CLUSTER))
    disk.ctx.run(disk.node.pwrite_zeroes(2 * CLUSTER, CLUSTER, RequestFlags.MAY_UNMAP))
    assert {0, 1, 2} <= images["data"].holes
    assert 3 not in images["data"].holes
    assert disk.read(0, 4 * CLUSTER) == bytes(3 * CLUSTER) + b"x" * CLUSTER


def test_discard_that_is_not_passed_on_leaves_the_data_file_alone(images: Images) -> None:
    make(images).close()
    disk = images.open("image", pass_discard_request=False)
    disk.write(0, b"x" * CLUSTER)
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    assert images["data"].content[:CLUSTER] == b"x" * CLUSTER
    assert disk.read(0, CLUSTER) == bytes(CLUSTER)


def test_zeroes_in_a_raw_data_file_are_bytes_and_leave_the_entries(images: Images) -> None:
    disk = make(images, raw=True)
    disk.write(0, b"x" * (4 * CLUSTER))
    disk.ctx.run(disk.node.pwrite_zeroes(100, 2 * CLUSTER, RequestFlags.NONE))
    expected = b"x" * 100 + bytes(2 * CLUSTER) + b"x" * (2 * CLUSTER - 100)
    assert images["data"].content[: 4 * CLUSTER] == expected
    disk.close()
    assert entries(images)[:4] == [COPIED | index * CLUSTER for index in range(4)]


def test_zero_entries_that_qemu_made_in_a_raw_data_file_can_be_written(images: Images) -> None:
    make(images, raw=True).close()
    set_entry(images, 0, 1)
    set_entry(images, 1, COPIED | CLUSTER | 1)
    set_entry(images, 2, 0)
    disk = images.open("image")
    disk.write(CLUSTER - 2, b"abcd")
    disk.write(2 * CLUSTER + 7, b"efgh")
    content = disk.read(0, 4 * CLUSTER)
    disk.close()
    assert images["data"].content[: 4 * CLUSTER] == content
    assert content[CLUSTER - 2 : CLUSTER + 2] == b"abcd"
    assert entries(images)[:3] == [COPIED | index * CLUSTER for index in range(3)]


@pytest.mark.parametrize("length", [MIB // 2, 3 * MIB + 1024])
def test_resized_disk_has_a_data_file_of_its_length(
    images: Images, raw: bool, length: int, tmp_path: Path
) -> None:
    disk = make(images, raw=raw)
    disk.write(0, b"x" * DISK_BYTES)
    disk.ctx.run(disk.node.truncate(length))
    content = disk.read(0, length)
    disk.close()
    assert content == (b"x" * DISK_BYTES).ljust(length, b"\0")[:length]
    assert len(images["data"].content) == length
    if raw:
        assert images["data"].content == content
        assert all(entries(images)[:128])
    images.check("image", tmp_path)
    images.compare("image", content, tmp_path)


def test_data_file_that_was_cut_short_reads_as_zeroes_and_is_made_whole_by_a_write(
    images: Images,
) -> None:
    disk = make(images)
    disk.close()
    del images["data"].content[CLUSTER:]
    disk = images.open("image")
    assert disk.read(0, DISK_BYTES) == bytes(DISK_BYTES)
    disk.write(3 * CLUSTER, b"x")
    assert len(images["data"].content) == DISK_BYTES


# --- the graph ---


def test_data_child_has_the_data_and_the_file_child_the_metadata(images: Images) -> None:
    children = make(images).node.children
    assert children["data-file"].role is Role.DATA
    assert children["file"].role is Role.METADATA


def test_block_status_and_direct_map_point_into_the_data_file(images: Images, raw: bool) -> None:
    disk = make(images, raw=raw)
    direct = disk.driver.direct_map()
    assert direct is not None
    disk.write(3 * CLUSTER, b"x" * CLUSTER)
    assert direct.lookup_write(3 * CLUSTER, 512) == 3 * CLUSTER
    assert direct.file is disk.node.children["data-file"].node.driver.host_file
    status = disk.ctx.run(disk.node.block_status(3 * CLUSTER, CLUSTER))
    assert (status.data, status.zero, status.host_offset, status.file) == (
        True, False, 3 * CLUSTER, "data",
    )  # fmt: skip


def test_erased_cluster_leaves_the_direct_map(images: Images) -> None:
    disk = make(images)
    direct = disk.driver.direct_map()
    assert direct is not None
    disk.write(0, b"x" * (2 * CLUSTER))
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    assert direct.lookup_read(0, 512) == -1
    assert direct.lookup_read(CLUSTER, 512) == CLUSTER


def test_flush_reaches_both_files_the_data_before_the_entries(images: Images) -> None:
    disk = make(images)
    order: list[str] = []
    for name in ("image", "data"):
        image = images[name]
        image.fault = lambda kind, offset, length, name=name: (  # type: ignore[misc]
            order.append(f"{name} {kind}") or 0  # type: ignore[func-returns-value]
        )
    disk.write(0, b"x" * CLUSTER)
    disk.flush()
    names_it = len(order) - 1 - order[::-1].index("image write")
    assert order.index("data write") < order.index("data flush") < names_it
    order.clear()
    disk.write(0, b"y" * CLUSTER)  # in place: nothing but data
    disk.flush()
    assert order[0] == "data write"
    assert "data flush" in order


def test_failed_flush_of_the_data_file_is_the_flushs_failure_and_entries_wait(
    images: Images,
) -> None:
    disk = make(images)
    disk.write(0, b"x" * CLUSTER)
    images["data"].fault = lambda kind, offset, length: 5 if kind == "flush" else 0
    images["image"].log.clear()
    with pytest.raises(OSError, match=r"I/O error|Input/output"):
        disk.flush()
    l2 = disk.driver.image.l1.words[0] & ~COPIED
    writes = images["image"].operations("write")
    assert not [found for found in writes if found.offset == l2]
    images["data"].fault = None
    disk.close()
    assert entries(images)[0] == COPIED


def test_moves_to_an_iothread_and_back_with_both_children() -> None:
    ctx = AioContext("main")
    ctx.adopt()
    thread = IOThread("io")
    thread.start()
    try:
        images = Images(ctx)
        disk = make(images)
        backend = BlockBackend("disk", disk.node, writable=True)
        ctx.run(backend.move_to(thread.ctx))
        assert {child.node.ctx for child in disk.node.children.values()} == {thread.ctx}

        async def write() -> None:
            await backend.pwritev(CLUSTER, memoryview(b"there"))
            await backend.flush()

        ctx.run(run_in_context(thread.ctx, write))
        ctx.run(backend.move_to(ctx))
        disk.write(0, b"back")
        ctx.run(backend.close())
        assert images["data"].content[:4] == b"back"
        assert images["data"].content[CLUSTER : CLUSTER + 5] == b"there"
    finally:
        thread.stop()
        ctx.close()


# --- which file ---


def test_option_names_another_data_file_than_the_header(images: Images) -> None:
    disk = make(images)
    disk.write(0, b"here")
    disk.close()
    images.files.add("moved", images["data"].content)
    del images.files.images["data"]
    assert "data: is the external data file of image: No such file" in reason(images)
    disk = images.open("image", data_file={"driver": "file", "filename": "moved"})
    assert disk.read(0, 4) == b"here"


def test_name_is_relative_to_the_image(images: Images) -> None:
    make(images).close()
    images.files.images["folder/image"] = images.files.images.pop("image")
    images.files.images["folder/data"] = images.files.images.pop("data")
    disk = images.open("folder/image")
    assert disk.node.children["data-file"].node.filename == "folder/data"


def test_missing_name_is_refused_unless_the_option_names_one(images: Images) -> None:
    make(images).close()
    rename(images, b"")
    assert "doesn't say which: give the option 'data-file'" in reason(images)
    images.open("image", data_file={"driver": "file", "filename": "data"}).close()


def test_data_file_for_an_image_without_one_is_refused(images: Images) -> None:
    images.create("image", MIB)
    images.files.add("data")
    found = reason(images, data_file={"driver": "file", "filename": "data"})
    assert "has no external data file" in found


@pytest.mark.parametrize("read_only", [False, True])
def test_image_that_names_itself_is_refused(images: Images, read_only: bool) -> None:
    make(images).close()
    rename(images, b"./image")
    assert "its own external data file" in reason(images, read_only=read_only)


def test_name_of_another_kind_of_file_is_refused(images: Images) -> None:
    make(images).close()
    rename(images, b"ssh://host/disk")
    assert "'ssh://host/disk': Unknown protocol" in reason(images)


@given(name=st.binary(max_size=80), length=st.one_of(st.none(), st.integers(0, 2**32 - 1)))
def test_any_extension_is_opened_or_refused_in_a_line(name: bytes, length: int | None) -> None:
    clock = VirtualClock()
    ctx = AioContext("fuzz", clock=clock, poller=MemoryPoller(clock))
    ctx.adopt()
    try:
        images = Images(ctx)
        make(images).close()
        rename(images, name)
        if length is not None:
            content = images["image"].content
            at = content.index(b"DATA")
            content[at + 4 : at + 8] = length.to_bytes(4, "big")
        with suppress(ImageError):
            images.open("image").close()
        assert not images.opener.nodes
    finally:
        ctx.close()


# --- what can't be ---


@pytest.mark.parametrize(
    ("word", "words"),
    [
        (COPIED | 2 * CLUSTER, "the guest's cluster is at 0x1000"),
        (COPIED | CLUSTER | 512, "no cluster of an external data file"),
        (1 << 62 | CLUSTER, "no cluster of an external data file"),
        (COPIED | CLUSTER | 2, "no cluster of an external data file"),
    ],
)
def test_impossible_entry_is_an_error_that_names_it(
    images: Images, word: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk = make(images)
    disk.write(0, b"x" * (3 * CLUSTER))
    disk.close()
    set_entry(images, 1, word)
    disk = images.open("image")
    with pytest.raises(OSError, match=words):
        disk.read(CLUSTER, 512)
    with pytest.raises(OSError, match=words):
        disk.write(CLUSTER, b"y")
    assert disk.read(0, 4) == b"xxxx"
    assert f"is {word:#x}" in caplog.text


def test_entry_without_the_copied_flag_gets_it_when_it_is_written(images: Images) -> None:
    disk = make(images)
    disk.write(CLUSTER, b"x" * CLUSTER)
    disk.close()
    set_entry(images, 1, CLUSTER)
    disk = images.open("image")
    disk.write(CLUSTER, b"y")
    assert disk.read(CLUSTER, CLUSTER) == b"y".ljust(CLUSTER, b"x")
    disk.close()
    assert entries(images)[1] == COPIED | CLUSTER


def test_snapshots_and_compressed_writes_are_refused(images: Images) -> None:
    disk = make(images)
    with pytest.raises(ImageError, match="can't have snapshots"):
        disk.ctx.run(disk.driver.snapshot_create("one"))
    with pytest.raises(OSError, match="not supported"):
        disk.write_compressed(0, b"x" * CLUSTER)


def test_raw_bit_without_a_data_file_is_dropped_and_with_one_is_kept(images: Images) -> None:
    make(images, raw=True).close()
    assert images["image"].content[95] == 2
    images.create("plain", MIB)
    images["plain"].content[95] = 2
    images.open("plain").close()
    assert images["plain"].content[95] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_file_raw": True}, "without a data_file"),
        ({"data_file": ""}, "empty"),
        ({"data_file": "a\0b"}, "zero byte"),
        ({"data_file": "data", "compat": "0.10"}, "compat=1.1"),
        (
            {"data_file": "data", "data_file_raw": True, "backing_file": "b", "backing_fmt": "raw"},
            "can't be had with data_file_raw",
        ),
    ],
)
def test_contradictory_options_are_refused(
    images: Images, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ImageError, match=words):
        images.create("image", MIB, **options)
