# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: made, gone back to and deleted on an open image."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.loop.clock import VirtualClock
from blockemu.loop.coroutine import Cancelled
from blockemu.loop.sync import sleep_ns
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

SIZE = 256 * KIB


def create(disk: Disk, name: str) -> None:
    disk.ctx.run(disk.driver.snapshot_create(name))


def apply(disk: Disk, name: str) -> None:
    disk.ctx.run(disk.driver.snapshot_apply(name))


def delete(disk: Disk, name: str) -> None:
    disk.ctx.run(disk.driver.snapshot_delete(name))


def clean(images: Images, tmp_path: Path) -> None:
    judged = Checker(images["image"].content)
    assert not judged.corruptions
    assert not judged.leaks
    images.check("image", tmp_path)


def used_clusters(images: Images) -> int:
    judged = Checker(images["image"].content)
    return sum(1 for count in judged.references.values() if count)


def test_snapshot_keeps_the_disk_as_it_was(images: Images, tmp_path: Path) -> None:
    images.create("image", SIZE, cluster_size=4096)
    disk = images.open("image")
    disk.write(10_000, b"old" * 10_000)
    old = disk.read(0, SIZE)
    create(disk, "before")
    disk.write(0, b"new" * 50_000)
    disk.ctx.run(disk.node.pdiscard(160_000, 50_000))
    assert disk.read(0, 3) == b"new"
    disk.close()
    assert Checker(images["image"].content).snapshot_contents() == {"before": old}
    clean(images, tmp_path)


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_going_back_brings_content_back_again_and_again(
    images: Images, tmp_path: Path, compat: str
) -> None:
    images.create("image", SIZE, cluster_size=512, compat=compat)
    disk = images.open("image")
    disk.write(0, b"a" * 100_000)
    old = disk.read(0, SIZE)
    create(disk, "s")
    for fill in (b"b", b"c"):
        disk.write(50_000, fill * 100_000)
        apply(disk, "s")
        assert disk.read(0, SIZE) == old
    disk.write(1, b"d")
    disk.close()
    judged = Checker(images["image"].content)
    assert judged.snapshot_contents() == {"s": old}
    assert judged.read() == b"ad" + old[2:]
    clean(images, tmp_path)


def test_deleting_frees_what_only_the_snapshot_used(images: Images, tmp_path: Path) -> None:
    images.create("image", SIZE, cluster_size=4096)
    disk = images.open("image")
    disk.write(0, b"a" * 100 * KIB)
    disk.flush()
    before = used_clusters(images)
    create(disk, "s")
    disk.write(0, b"b" * 100 * KIB)
    delete(disk, "s")
    assert disk.driver.snapshots == ()
    disk.flush()
    assert used_clusters(images) == before
    assert disk.read(0, 100 * KIB) == b"b" * 100 * KIB
    disk.close()
    clean(images, tmp_path)


def test_deleted_space_is_offered_to_the_host(images: Images) -> None:
    image = images.create("image", SIZE, cluster_size=4096)
    disk = images.open("image")
    disk.write(0, b"a" * 100 * KIB)
    create(disk, "s")
    disk.write(0, b"b" * 100 * KIB)
    image.log.clear()
    delete(disk, "s")
    freed = sum(operation.length for operation in image.operations("discard"))
    assert freed >= 100 * KIB


def test_space_is_ours_alone_again_once_the_last_snapshot_is_deleted(images: Images) -> None:
    images.create("image", SIZE, cluster_size=4096)
    disk = images.open("image")
    disk.write(0, b"a" * 100 * KIB)
    create(disk, "s")
    create(disk, "t")
    delete(disk, "s")
    disk.flush()
    assert not Checker(images["image"].content).corruptions
    delete(disk, "t")
    disk.flush()
    used = used_clusters(images)
    disk.write(0, b"b" * 100 * KIB)  # in place
    disk.flush()
    assert used_clusters(images) == used


def test_disk_takes_the_size_that_it_had(images: Images, tmp_path: Path) -> None:
    images.create("image", 100 * KIB, cluster_size=512)
    disk = images.open("image")
    disk.write(0, b"a" * (100 * KIB))
    create(disk, "small")
    disk.ctx.run(disk.node.truncate(40 * MIB))
    disk.write(40 * MIB - KIB, b"z" * KIB)
    create(disk, "large")
    apply(disk, "small")
    assert disk.node.length_bytes == 100 * KIB
    assert disk.read(0, 100 * KIB) == b"a" * (100 * KIB)
    disk.ctx.run(disk.node.truncate(40 * MIB))
    assert disk.read(99 * KIB, 40 * MIB - 99 * KIB) == b"a" * KIB + bytes(40 * MIB - 100 * KIB)
    apply(disk, "large")
    assert disk.node.length_bytes == 40 * MIB
    assert disk.read(40 * MIB - KIB, KIB) == b"z" * KIB
    assert [entry.disk_size for entry in disk.driver.snapshots] == [100 * KIB, 40 * MIB]
    disk.close()
    clean(images, tmp_path)


def test_empty_disk_has_snapshots_too(images: Images, tmp_path: Path) -> None:
    images.create("image", 0)
    disk = images.open("image")
    create(disk, "nothing")
    disk.ctx.run(disk.node.truncate(MIB))
    disk.write(0, b"x")
    apply(disk, "nothing")
    assert disk.node.length_bytes == 0
    disk.close()
    clean(images, tmp_path)
    disk = images.open("image")
    delete(disk, "nothing")
    disk.close()
    clean(images, tmp_path)


def test_ids_count_up_and_the_date_is_the_wall_clocks(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    clock = disk.ctx._clock
    assert isinstance(clock, VirtualClock)
    clock.set_ns(1_700_000_000_123_456_789)
    for name in ("a", "b", "b"):
        create(disk, name)
    delete(disk, "a")
    create(disk, "c")
    found = disk.driver.snapshots
    assert [(entry.id, entry.name) for entry in found] == [("2", "b"), ("3", "b"), ("4", "c")]
    assert (found[0].date_sec, found[0].date_nsec) == (1_700_000_000, 123_456_789)
    assert found[0].icount == 0
    disk.close()
    assert images.open("image").driver.snapshots == found


def test_id_comes_before_name_but_not_for_deletion(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    for name, fill in (("x", b"1"), ("1", b"2")):
        disk.write(0, fill)
        create(disk, name)
    apply(disk, "1")
    assert disk.read(0, 1) == b"1"
    delete(disk, "1")
    assert [entry.name for entry in disk.driver.snapshots] == ["x"]
    delete(disk, "1")
    assert disk.driver.snapshots == ()


def refusal(disk: Disk, call: Coroutine[Any, Any, None]) -> str:
    with pytest.raises(ImageError) as caught:
        disk.ctx.run(call)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_snapshot_is_refused_by_name(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    for call in (disk.driver.snapshot_apply("no"), disk.driver.snapshot_delete("no")):
        assert refusal(disk, call) == "image: there is no snapshot 'no'"
    disk.write(0, b"x")  # all locks were given back


def test_read_only_image_has_its_snapshots_refused(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image", read_only=True)
    assert "read-only" in refusal(disk, disk.driver.snapshot_create("s"))


def test_name_that_qemu_could_not_keep_is_refused(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    assert "at most 255 bytes" in refusal(disk, disk.driver.snapshot_create("ü" * 128))
    create(disk, "ü" * 127)


def test_one_bit_counts_are_refused_and_nothing_is_changed(images: Images) -> None:
    image = images.create("image", MIB, refcount_bits=1)
    disk = images.open("image")
    disk.write(0, b"x" * MIB)
    disk.flush()
    before = bytes(image.content)
    assert "refcount_bits=1" in refusal(disk, disk.driver.snapshot_create("s"))
    disk.flush()
    assert image.content == before


@pytest.mark.parametrize("refcount_bits", [2, 8])
def test_count_at_its_limit_is_refused_and_all_counts_are_as_before(
    images: Images, tmp_path: Path, refcount_bits: int
) -> None:
    image = images.create("image", MIB, refcount_bits=refcount_bits, cluster_size=16 * KIB)
    disk = images.open("image")
    disk.write(0, b"x" * (700 * KIB))
    for number in range((1 << refcount_bits) - 2):
        create(disk, f"s{number}")
    disk.write(0, b"y" * (100 * KIB))
    disk.flush()
    before = Checker(image.content)
    said = refusal(disk, disk.driver.snapshot_create("more"))
    limit = (1 << refcount_bits) - 1
    assert f"has {limit} references already, the most that refcount_bits={refcount_bits}" in said
    disk.flush()
    after = Checker(image.content)
    assert after.references == before.references
    assert not after.corruptions
    assert not after.leaks
    apply(disk, "s0")  # no count needs to be higher than before or after
    assert disk.read(0, KIB) == b"x" * KIB
    disk.close()
    clean(images, tmp_path)


def test_in_place_short_cut_is_withdrawn_before_a_snapshot_is_made(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    old = disk.driver.direct_map()
    assert old is not None
    disk.write(0, b"a" * 64 * KIB)
    assert old.lookup_write(0, 4096) >= 0
    create(disk, "s")
    assert old.lookup_read(0, 4096) == -1
    new = disk.driver.direct_map()
    assert new is not None
    disk.read(0, 4096)
    assert new.lookup_read(0, 4096) >= 0
    assert new.lookup_write(0, 4096) == -1
    disk.write(0, b"b" * 4096)
    assert new.lookup_write(0, 4096) >= 0
    apply(disk, "s")
    assert new.lookup_read(0, 4096) == -1
    assert disk.read(0, 4096) == b"a" * 4096


def test_requests_at_the_door_wait_and_go_on(images: Images) -> None:
    image = images.create("image", MIB, cluster_size=4096)
    image.latency_ns = lambda kind, offset, length: 1000
    disk = images.open("image")
    backend = BlockBackend("client", disk.node, writable=True)
    disk.write(0, b"a" * 4096)

    async def work() -> None:
        making = disk.ctx.spawn(disk.driver.snapshot_create("s"))
        await backend.pwritev(0, memoryview(b"b" * 4096))
        making.result()  # it came first, and was done

    disk.ctx.run(work())
    assert disk.read(0, 1) == b"b"
    apply(disk, "s")
    assert disk.read(0, 1) == b"a"


def test_writers_beside_a_snapshot_see_their_own_writes(images: Images, seed: int) -> None:
    rng = random.Random(seed)
    image = images.create("image", SIZE, cluster_size=512)
    image.latency_ns = lambda kind, offset, length: rng.randrange(1, 1000)
    disk = images.open("image")
    backend = BlockBackend("client", disk.node, writable=True)
    content = bytearray(SIZE)

    async def write(slot: int) -> None:
        for fill in range(1, 30):
            start = slot * 16 * KIB + rng.randrange(8 * KIB)
            data = bytes((fill,)) * rng.randrange(1, 8 * KIB)
            await backend.pwritev(start, memoryview(data))
            content[start : start + len(data)] = data
            found = bytearray(len(data))
            await backend.preadv(start, memoryview(found))
            assert found == data

    async def snap() -> None:
        for turn in range(12):
            await disk.driver.snapshot_create(f"s{turn}")
            if turn >= 2:
                await disk.driver.snapshot_delete(f"s{turn - 2}")

    tasks = [disk.ctx.spawn(write(slot)) for slot in range(8)]

    async def all_of_them() -> None:
        await snap()
        for task in tasks:
            await task

    disk.ctx.run(all_of_them())
    assert disk.read(0, SIZE) == content
    disk.ctx.run(backend.close())
    judged = Checker(image.content)
    assert not judged.corruptions
    assert not judged.leaks
    assert set(judged.snapshot_contents()) == {"s10", "s11"}


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
def test_failed_write_leaves_the_image_as_it_was_or_stops_it(
    images: Images, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each write and flush of the action fails in turn."""
    caplog.set_level(logging.CRITICAL)
    old, new = b"o" * SIZE, b"n" * 100_000 + b"o" * (SIZE - 100_000)
    failures = 0
    while True:
        image = images.create("image", SIZE, cluster_size=512)
        disk = images.open("image")
        disk.write(0, old)
        create(disk, "s")
        disk.write(0, new[:100_000])
        calls = 0

        def fault(kind: str, offset: int, length: int) -> int:
            nonlocal calls
            calls += kind in ("write", "flush", "zero", "truncate")
            return errno.ENOSPC if calls == failures + 1 and kind != "read" else 0  # noqa: B023

        image.fault = fault
        call = {
            "create": disk.driver.snapshot_create,
            "apply": disk.driver.snapshot_apply,
            "delete": disk.driver.snapshot_delete,
        }[action]
        failed = False
        try:
            disk.ctx.run(call("t" if action == "create" else "s"))
        except OSError:
            failed = True
        image.fault = None
        if not failed:
            disk.close()
            break
        stopped = disk.driver.image.writer.is_stopped
        if not stopped:
            assert disk.read(0, SIZE) == new
            disk.write(0, b"w" * 3000)
            disk.close()
        else:
            disk.abandon()
        judged = Checker(images["image"].content)
        assert not judged.corruptions
        names = set(judged.snapshot_contents())
        if stopped:
            assert names in ({"s"}, {"s", "t"}, set())
        else:
            assert judged.read() == b"w" * 3000 + new[3000:]
            assert names == {"s"}
            assert not judged.corruptions
            assert not judged.leaks
        failures += 1
    assert failures > 4


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
def test_cancelled_action_leaves_leaks_at_most(
    images: Images, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is cancelled a little later each time, until it is done before."""
    caplog.set_level(logging.CRITICAL)
    old, new = b"o" * SIZE, b"n" * 100_000 + b"o" * (SIZE - 100_000)
    rounds = 0
    while True:
        image = images.create("image", SIZE, cluster_size=4096)
        disk = images.open("image")
        disk.write(0, old)
        create(disk, "s")
        disk.write(0, new[:100_000])
        image.latency_ns = lambda kind, offset, length: 1000
        call = {
            "create": disk.driver.snapshot_create,
            "apply": disk.driver.snapshot_apply,
            "delete": disk.driver.snapshot_delete,
        }[action]

        async def cancel_it() -> bool:
            task = disk.ctx.spawn(call("t" if action == "create" else "s"))  # noqa: B023
            await sleep_ns(rounds * 1000 + 500)  # noqa: B023
            ended = task.done()
            task.cancel()
            with suppress(Cancelled):
                await task
            return ended

        ended = disk.ctx.run(cancel_it())
        image.latency_ns = None
        if disk.driver.image.writer.is_stopped:
            disk.abandon()
        else:
            assert disk.read(0, SIZE) in ((new, old) if action == "apply" else (new,))
            disk.write(0, b"w" * 3000)
            disk.close()
        judged = Checker(images["image"].content)
        assert not judged.corruptions
        assert judged.snapshot_contents().get("s", old) == old
        if ended:
            break
        rounds += 1
    assert rounds > 10


# --- read by the option `snapshot` ---


def test_option_snapshot_shows_that_disk(images: Images) -> None:
    images.create("image", 100 * KIB, cluster_size=4096)
    disk = images.open("image")
    disk.write(0, b"old" * 20_000)
    old = disk.read(0, 100 * KIB)
    create(disk, "s")
    disk.ctx.run(disk.node.truncate(MIB))
    disk.write(0, b"new" * 100_000)
    disk.close()
    for wanted in ("s", "1"):
        shown = images.open("image", read_only=True, snapshot=wanted)
        assert shown.node.length_bytes == 100 * KIB
        assert shown.read(0, 100 * KIB) == old
        shown.close()
    assert images.open("image", read_only=True).read(0, 3) == b"new"


def test_option_snapshot_is_for_reading_and_for_what_there_is(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    create(disk, "s")
    disk.close()
    with pytest.raises(ImageError, match="snapshot 's' can only be opened read-only"):
        images.open("image", snapshot="s")
    with pytest.raises(ImageError, match="there is no snapshot 't'"):
        images.open("image", read_only=True, snapshot="t")
