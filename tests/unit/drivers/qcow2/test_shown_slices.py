# SPDX-License-Identifier: Apache-2.0
"""What native code finds in L2 slices: data, until somebody is about to change what they say."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers._direct_map import ffi, lib
from blockemu.drivers.direct_map import DirectMap, TableWords
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.native_map import NativeMap
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from blockemu.loop.sync import gather, yield_now
from tests.unit.drivers.native_poller import FakePoller
from tests.unit.drivers.qcow2.support import MIB, Disk, Images, Twin, in_place
from tests.unit.drivers.test_native_map import make_map

CLUSTER = 65536
SMALL = {"cluster_size": 512}
TINY_CACHE = {"l2_cache_size": 2048, "l2_cache_entry_size": 512}


def written(images: Images, clusters: int = 8, **options: object) -> Disk:
    """A disk of 16 clusters with data in the first `clusters`, freshly opened."""
    images.create("image", 16 * CLUSTER)
    disk = images.open("image")
    for index in range(clusters):
        disk.write(index * CLUSTER, bytes([index + 1]) * CLUSTER)
    disk.close()
    return images.open("image", **options)


def finds(disk: Disk, twin: Twin, cluster: int) -> bool:
    """Whether the twin leads to a cluster, and then to what the guest has there."""
    host = twin.find(cluster * CLUSTER, 512)
    if host >= 0:
        assert disk.images["image"].content[host] == cluster + 1
    return host >= 0


def test_one_read_shows_the_clusters_around_it(images: Images) -> None:
    disk = written(images)
    twin = Twin(disk)
    assert not finds(disk, twin, 0)
    disk.read(0, 512)
    assert [finds(disk, twin, cluster) for cluster in range(16)] == [True] * 8 + [False] * 8
    assert twin.find(3 * CLUSTER, 5 * CLUSTER) >= 0
    assert twin.find(3 * CLUSTER, 6 * CLUSTER) == -1
    assert twin.find(0, 512, writable=True) >= 0, "that was published"
    assert twin.find(CLUSTER, 512, writable=True) == -1


def test_new_data_is_seen_once_it_is_written(images: Images) -> None:
    disk = written(images)
    twin = Twin(disk)
    disk.read(0, 512)
    disk.write(12 * CLUSTER, bytes([13]) * CLUSTER)
    disk.node.driver.direct_map()
    assert finds(disk, twin, 12)
    assert not finds(disk, twin, 11)


@pytest.mark.parametrize("change", ["zero", "unmap", "discard", "compress"])
def test_change_hides_the_slice_until_it_is_over(images: Images, change: str) -> None:
    disk = written(images, discard="unmap")
    twin, node = Twin(disk), disk.node
    disk.driver.image.compressor.offload = in_place
    disk.read(0, 512)
    direct = disk.driver.direct_map()
    assert direct is not None
    native = direct.native
    assert native is not None
    under_way = ffi.new("struct map_pin *")
    lib.direct_map_pin(native.cdata, under_way)

    async def act() -> None:
        if change == "discard":
            await node.pdiscard(2 * CLUSTER, CLUSTER)
        elif change == "compress":
            data = memoryview(b"c" * CLUSTER)
            await node.pwritev(2 * CLUSTER, data, RequestFlags.WRITE_COMPRESSED)
        else:
            flags = RequestFlags.MAY_UNMAP if change == "unmap" else RequestFlags.NONE
            await node.pwrite_zeroes(2 * CLUSTER, CLUSTER, flags)

    task = disk.ctx.spawn(act())
    while finds(disk, twin, 2):
        disk.ctx.poll(blocking=True)
    assert not task.done(), "the change waits for a read that is under way"
    disk.read(5 * CLUSTER, 512)
    assert finds(disk, twin, 5), "published, one by one"
    assert not finds(disk, twin, 2)
    assert not finds(disk, twin, 6), "shown while somebody is about to change it"
    assert lib.direct_map_unpin(native.cdata, under_way)
    twin.post(native)
    disk.ctx.run(finished(task))
    disk.read(4 * CLUSTER, 512)
    assert finds(disk, twin, 6)
    assert not finds(disk, twin, 2)


async def finished(task: object) -> None:
    while not task.done():  # type: ignore[attr-defined]
        await yield_now()


def test_snapshot_takes_everything_back(images: Images) -> None:
    disk = written(images)
    twin = Twin(disk)
    disk.read(0, 512)
    assert finds(disk, twin, 7)
    disk.ctx.run(disk.driver.snapshot_create("s"))
    assert not finds(disk, twin, 7)
    disk.read(0, 512)
    assert finds(disk, twin, 7)
    disk.write(7 * CLUSTER, bytes([8]) * CLUSTER)  # in a new place, by a table of its own
    assert finds(disk, twin, 7)
    disk.write(6 * CLUSTER + 5, b"\7")
    assert finds(disk, twin, 6)


def test_full_cache_shows_what_is_met_again_and_hides_what_goes(images: Images) -> None:
    clusters = 64 * 8  # of 512 bytes: 64 entries a slice, 8 slices, of which 4 stay
    images.create("image", clusters * 512, **SMALL)
    disk = images.open("image")
    disk.write(0, b"".join(index.to_bytes(8, "big") * 64 for index in range(clusters)))
    disk.close()
    disk = images.open("image", **TINY_CACHE)
    twin = Twin(disk)

    def found(cluster: int) -> bool:
        host = twin.find(cluster * 512, 512)
        if host >= 0:
            content = images["image"].content[host : host + 8]
            assert int.from_bytes(content, "big") == cluster
        return host >= 0

    for number in range(4):
        disk.read(number * 64 * 512, 512)
    assert not found(3 * 64 + 5), "the last one filled the cache"
    disk.read((3 * 64 + 1) * 512, 512)
    assert found(3 * 64 + 5)
    assert [found(number * 64 + 5) for number in range(3)] == [True] * 3
    for number in range(4, 8):
        disk.read(number * 64 * 512, 512)
        disk.read((number * 64 + 1) * 512, 512)
    shown = [found(number * 64 + 5) for number in range(8)]
    slices = disk.driver.image.l2.slices
    assert sum(shown) == len(slices) == 4


def test_what_is_used_stays_in_the_cache(images: Images) -> None:
    clusters = 64 * 8
    images.create("image", clusters * 512, **SMALL)
    disk = images.open("image")
    disk.write(0, b"x" * (clusters * 512))
    disk.close()
    disk = images.open("image", **TINY_CACHE)
    twin = Twin(disk)
    for number in range(4):
        for cluster in range(2):
            disk.read((number * 64 + cluster) * 512, 512)
    assert twin.find(5 * 512, 512) >= 0
    for number in range(4, 8):
        disk.read(number * 64 * 512, 512)
        assert twin.find(5 * 512, 512) >= 0, "slice 0 is in use all the time"


@given(words=st.data())
def test_words_lead_only_to_plain_data(words: st.DataObject) -> None:
    cluster = 1 << 16
    hosts = st.sampled_from([0, cluster, 5 * cluster, 63 * cluster, 64 * cluster, 512])
    flags = st.sampled_from([0, COPIED, COMPRESSED, ZERO, COPIED | ZERO, 1 << 56, 2])
    drawn = words.draw(st.lists(st.tuples(hosts, flags), min_size=8, max_size=8))
    table = array("Q", [host | flag for host, flag in drawn])
    form = TableWords(3, host_mask=OFFSET_MASK, plain_mask=COPIED)
    direct_map = make_map(words=form)
    native = direct_map.native_handle(FakePoller())
    assert native is not None
    native.show(2, table.buffer_info()[0], host_end=64 * cluster)
    for index, (host, flag) in enumerate(drawn):
        plain = host % cluster == 0 and 0 < host < 64 * cluster and flag in (0, COPIED)
        found = lib.direct_map_find(native.cdata, (16 + index) * cluster + 7, 9, 0)
        assert found == (host + 7 if plain else -1)
        assert lib.direct_map_find(native.cdata, (16 + index) * cluster, 9, 1) == -1
        assert lib.direct_map_find(native.cdata, (8 + index) * cluster, 9, 0) == -1
    assert_hidden(direct_map, native, table)


def assert_hidden(direct_map: DirectMap, native: NativeMap, table: array[int]) -> None:
    address = table.buffer_info()[0]
    native.hide(2, address + 8)
    assert native.cdata.slices.count == 1, "that was somebody else's"
    native.was_used(2, address)
    assert not native.was_used(2, address)
    direct_map._withdraw(17 << 16, 1)
    assert native.cdata.slices.count == 0


def test_map_is_filled_for_a_request_that_needs_no_waiting(images: Images) -> None:
    disk = written(images)
    direct = disk.driver.direct_map()
    assert direct is not None
    assert direct.find_read(0, 512) == -1, "its slice isn't in memory"
    disk.read(0, 512)
    host = direct.find_read(3 * CLUSTER, 512)
    assert images["image"].content[host] == 4
    assert direct.find_write(4 * CLUSTER, 512) == direct.lookup_read(4 * CLUSTER, 512) >= 0
    assert direct.find_read(9 * CLUSTER, 512) == -1
    for offset in (15 * CLUSTER + 512, 16 * CLUSTER, 1 << 60):
        assert direct.find_read(offset, CLUSTER) == direct.find_write(offset, CLUSTER) == -1
    direct.hold()
    assert direct.find_read(5 * CLUSTER, 512) == -1
    direct.release()
    assert direct.find_read(5 * CLUSTER, 512) >= 0


def test_map_is_not_filled_where_somebody_changes_it(images: Images) -> None:
    disk = written(images)
    direct = disk.driver.direct_map()
    assert direct is not None
    disk.read(0, 512)
    locks = disk.driver.image.locks
    held = disk.ctx.run(locks.exclusive(3, 4))
    assert direct.find_read(3 * CLUSTER, 512) == -1
    assert direct.find_read(2 * CLUSTER, 512) >= 0
    assert direct.find_read(2 * CLUSTER, 2 * CLUSTER) == -1
    locks.release(held)
    assert direct.find_read(3 * CLUSTER, 512) >= 0


def test_damaged_entry_is_left_to_the_request(images: Images) -> None:
    disk = written(images)
    direct = disk.driver.direct_map()
    assert direct is not None
    disk.read(0, 512)
    found = disk.driver.image.clusters.cached(3)
    assert found is not None
    found.words[3] |= 512
    assert direct.find_read(3 * CLUSTER, 512) == -1
    with pytest.raises(OSError, match="L2 entry"):
        disk.read(3 * CLUSTER, 512)


def test_twin_agrees_with_the_node_whatever_happens(images: Images, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    size = 64 * 6 * 512
    images.create("image", size, **SMALL)
    disk = images.open("image", discard="unmap", **TINY_CACHE)
    twin = Twin(disk)

    async def act() -> None:
        first, count = rng.randrange(380), rng.randrange(1, 5)
        offset, length = first * 512, count * 512
        kind = rng.choice(("write", "write", "read", "read", "read", "zero", "discard"))
        if kind == "write":
            data = rng.randbytes(8) * (length // 8)
            await disk.node.pwritev(offset, memoryview(data))
        elif kind == "read":
            await disk.node.preadv(offset, memoryview(bytearray(length)))
        elif kind == "zero":
            await disk.node.pwrite_zeroes(offset, length, RequestFlags.MAY_UNMAP)
        else:
            await disk.node.pdiscard(offset, length)

    hits = 0
    for turn in range(150):
        disk.ctx.run(gather(*(act() for _ in range(4))))
        if turn % 50 == 49:
            disk.flush()
        content = disk.images["image"].content
        hosts = [twin.find(cluster * 512, 512) for cluster in range(384)]
        wanted = disk.read(0, size)
        for cluster, host in enumerate(hosts):
            if host >= 0:
                hits += 1
                assert content[host : host + 512] == wanted[cluster * 512 : cluster * 512 + 512]
    assert hits > 1000


def test_images_of_other_forms_show_nothing(images: Images) -> None:
    images.create("image", MIB, extended_l2=True)
    assert images.open("image").driver.image.reader.shown is None
