# SPDX-License-Identifier: Apache-2.0
"""The order in which things reach the file, and what a flush covers."""

from __future__ import annotations

import contextlib
import errno

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.sync import gather
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 4 * KIB


def kinds(images: Images, disk: Disk) -> list[str]:
    """The host's writes and flushes since the log was cleared, writes named after their target."""
    image = disk.driver.image
    names = {
        0: "header",
        image.header.refcount_table_offset >> 12: "reftable",
        image.header.l1_table_offset >> 12: "l1",
    }
    for entry in image.l1.words:
        names[(entry & ~(1 << 63)) >> 12] = "l2"
    for entry in image.writer.reftable.words:
        names.setdefault(entry >> 12, "blocks")
    names[0] = "header"
    found = []
    for operation in images["image"].operations("write", "zero", "flush", "discard"):
        if operation.kind in ("flush", "discard"):
            found.append(operation.kind)
        else:
            found.append(names.get(operation.offset >> 12, "data"))
    return found


def test_first_write_and_flush_go_out_in_phases(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.flush()
    assert kinds(images, disk) == ["data", "blocks", "flush", "l2", "flush", "l1", "flush"]


def test_write_in_place_needs_one_flush(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.flush()
    images["image"].log.clear()
    disk.write(100, b"y" * 100)
    disk.flush()
    assert kinds(images, disk) == ["data", "flush"]


def test_new_refcount_block_is_complete_before_the_table_names_it(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER, refcount_bits=64)
    disk = images.open("image")
    disk.write(0, b"x" * (512 * CLUSTER))  # a block counts 512 clusters
    images["image"].log.clear()
    disk.flush()
    assert kinds(images, disk) == [
        "blocks", "blocks", "flush", "reftable", "flush", "l2", "flush", "l1", "flush",
    ]  # fmt: skip


def test_let_go_cluster_is_not_taken_before_a_flush(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.flush()
    old = disk.ctx.run(disk.driver.image.clusters.resolve(0, 1)).host
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    disk.write(CLUSTER, b"y" * CLUSTER)
    assert disk.ctx.run(disk.driver.image.clusters.resolve(CLUSTER, 1)).host != old
    disk.flush()
    disk.write(2 * CLUSTER, b"z" * CLUSTER)
    assert disk.ctx.run(disk.driver.image.clusters.resolve(2 * CLUSTER, 1)).host == old
    disk.close()
    assert not Checker(images["image"].content).leaks


def test_discarded_space_goes_back_to_the_host_after_the_flush(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * (8 * CLUSTER))
    disk.flush()
    images["image"].log.clear()
    disk.ctx.run(disk.node.pdiscard(0, 8 * CLUSTER))
    assert not images["image"].operations("discard")
    disk.flush()
    (discard,) = images["image"].operations("discard")
    assert discard.length == 8 * CLUSTER
    disk.close()


def test_discards_stay_in_the_image_when_told_so(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image", pass_discard_request=False)
    disk.write(0, b"x" * CLUSTER)
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    disk.flush()
    assert not images["image"].operations("discard")


def test_flushes_at_once_share_runs(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    images["image"].latency_ns = lambda kind, offset, length: 1000
    disk.write(0, b"x" * CLUSTER)
    images["image"].log.clear()
    disk.ctx.run(gather(*(disk.node.flush() for _ in range(20))))
    assert len(images["image"].operations("flush")) <= 4


def test_write_that_completes_during_a_flush_waits_for_the_next(images: Images) -> None:
    images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    image = images["image"]
    image.latency_ns = lambda kind, offset, length: 100_000 if kind == "flush" else 10
    disk.write(0, b"x" * CLUSTER)

    async def both() -> None:
        flush = disk.ctx.spawn(disk.node.flush())
        await disk.node.pwritev(CLUSTER, memoryview(b"y" * CLUSTER))
        await flush

    disk.ctx.run(both())
    assert disk.driver.image.writer.is_dirty
    table = disk.driver.image.l1.words[0] & ~(1 << 63)
    assert int.from_bytes(image.content[table : table + 8], "big")
    assert not int.from_bytes(image.content[table + 8 : table + 16], "big")
    disk.flush()
    assert int.from_bytes(image.content[table + 8 : table + 16], "big")


@pytest.mark.parametrize("failing", ["write", "flush"])
def test_failed_flush_is_reported_and_made_good_by_the_next(images: Images, failing: str) -> None:
    image = images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.write(5 * MIB, b"y" * CLUSTER)
    for broken in range(6):
        seen = 0

        def fault(kind: str, offset: int, length: int, broken: int = broken) -> int:
            nonlocal seen
            seen += kind == failing
            return errno.EIO if kind == failing and seen > broken else 0

        image.fault = fault
        with contextlib.suppress(OSError):
            disk.flush()
        assert not Checker(image.content).corruptions
    image.fault = None
    disk.flush()
    judged = Checker(image.content)
    assert not judged.corruptions
    assert judged.read()[:CLUSTER] == b"x" * CLUSTER


def test_no_space_is_reported_and_leaves_a_clean_image(images: Images) -> None:
    image = images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    limit = len(image.content) + 64 * KIB
    image.fault = lambda kind, offset, length: (
        errno.ENOSPC if kind == "write" and offset + length > limit else 0
    )
    written = 0
    while (written + 6 * CLUSTER) <= 64 * KIB:
        disk.write(written, b"x" * CLUSTER)
        written += CLUSTER
    with pytest.raises(OSError) as caught:
        disk.write(written, b"x" * (16 * CLUSTER))
    assert caught.value.errno == errno.ENOSPC
    image.fault = None
    disk.write(8 * MIB, b"y" * CLUSTER)
    disk.close()
    judged = Checker(image.content)
    assert (judged.corruptions, judged.leaks) == ([], [])
    assert judged.read()[:written] == b"x" * written


def test_many_clusters_let_go_cause_a_flush_of_their_own(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockemu.drivers.qcow2.metadata_writer.LET_GO_MAX", 50)
    image = images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    for _ in range(40):
        disk.write(0, b"x" * (10 * CLUSTER))
        disk.ctx.run(disk.node.pwrite_zeroes(0, 10 * CLUSTER, RequestFlags.MAY_UNMAP))
    assert disk.driver.image.refcounts.used_end < 150
    disk.close()
    assert not Checker(image.content).leaks


def test_reused_l2_table_shows_nothing_of_its_past(images: Images) -> None:
    image = images.create("image", 16 * MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * (20 * CLUSTER))
    disk.close()
    l1 = disk.driver.image.header.l1_table_offset
    image.content[l1] &= 0x7F  # as if the table were shared: it is copied before it is changed
    disk = images.open("image")
    old = disk.driver.image.l1.words[0]
    assert disk.read(0, 20 * CLUSTER) == b"x" * (20 * CLUSTER)
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    disk.flush()
    for index in range(1, 8):
        disk.write(index * 2 * MIB, b"z")
    assert old in (word & ~(1 << 63) for word in disk.driver.image.l1.words[1:])
    for index in range(1, 8):
        assert disk.read(index * 2 * MIB, 20 * CLUSTER) == b"z" + bytes(20 * CLUSTER - 1)
    disk.close()
    judged = Checker(image.content)
    assert (judged.corruptions, judged.leaks) == ([], [])
