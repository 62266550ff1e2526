# SPDX-License-Identifier: Apache-2.0
"""Where a chain of images is known to be zeroes without a read: what it says is true, and it asks
no file."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.known_zeroes import known_zeroes
from blockemu.loop.aio_context import AioContext
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 64 * KIB


def zeroes(disk: Disk, offset: int, length: int, *, worth: int = 1) -> list[tuple[int, int]]:
    return disk.ctx.run(known_zeroes(disk.node, offset, length, worth=worth))


def test_unallocated_and_zero_clusters_are_one_stretch(images: Images) -> None:
    images.create("image", 8 * CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.write(2 * CLUSTER, b"x" * CLUSTER)
    disk.ctx.run(disk.node.pwrite_zeroes(2 * CLUSTER, CLUSTER))
    disk.write(7 * CLUSTER, b"x")
    assert zeroes(disk, 0, 8 * CLUSTER) == [(CLUSTER, 6 * CLUSTER)]
    assert zeroes(disk, CLUSTER + 5, 100) == [(CLUSTER + 5, 100)]
    assert zeroes(disk, 0, CLUSTER) == []


def test_short_stretches_arent_worth_it(images: Images) -> None:
    images.create("image", 8 * CLUSTER)
    disk = images.open("image")
    for cluster in (0, 2, 7):
        disk.write(cluster * CLUSTER, b"x")
    assert zeroes(disk, 0, 8 * CLUSTER, worth=CLUSTER + 1) == [(3 * CLUSTER, 4 * CLUSTER)]


def test_reads_of_data_arent_worth_a_walk(images: Images) -> None:
    """The usual case, which is told by a look at the tables that are in memory."""
    images.create("image", 8 * CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * (4 * CLUSTER))
    worth = disk.driver.may_tell_zeroes
    assert not worth(0, 4 * CLUSTER)
    assert not worth(CLUSTER + 5, 100)
    assert worth(0, 4 * CLUSTER + 1)
    assert worth(4 * CLUSTER, CLUSTER)
    disk.ctx.run(disk.node.pwrite_zeroes(2 * CLUSTER, CLUSTER))
    assert worth(0, 4 * CLUSTER)


def chain(images: Images) -> Disk:
    """Clusters of the top, the middle and a raw base: data in one of them, or nowhere."""
    images.files.add("base", b"\xbb" * (4 * CLUSTER))
    images.create("middle", 16 * CLUSTER, backing_file="base", backing_fmt="raw")
    middle = images.open("middle")
    middle.write(5 * CLUSTER, b"m" * CLUSTER)
    middle.ctx.run(middle.node.pwrite_zeroes(0, CLUSTER))
    middle.close()
    images.create("top", 20 * CLUSTER, backing_file="middle", backing_fmt="qcow2")
    disk = images.open("top")
    disk.write(6 * CLUSTER, b"t" * CLUSTER)
    return disk


def test_a_chain_is_asked_down_to_what_only_a_file_can_tell(images: Images) -> None:
    disk = chain(images)
    # 0: zeroes of the middle; 1 to 3: the base's; 4: behind its end; 5, 6: data; then nothing.
    found = zeroes(disk, 0, 16 * CLUSTER)
    assert found[0] == (0, CLUSTER)
    assert all(offset >= 4 * CLUSTER for offset, _ in found[1:])
    for offset, length in found:
        assert disk.read(offset, length) == bytes(length)
    # Behind the end of the backing file.
    assert zeroes(disk, 16 * CLUSTER, 4 * CLUSTER) == [(16 * CLUSTER, 4 * CLUSTER)]


def test_the_base_isnt_asked(images: Images) -> None:
    disk = chain(images)
    base = disk.node.children["backing"].node.children["backing"].node
    assert not base.driver.may_tell_zeroes(0, CLUSTER)

    async def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("the base was asked")

    base.status_runs = base.block_status = refuse  # type: ignore[assignment,method-assign]
    assert zeroes(disk, 0, 4 * CLUSTER) == [(0, CLUSTER)]


Operations = list[tuple[str, int, int]]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "unmap", "discard"]),
        st.integers(0, 255),
        st.integers(1, 40),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(below=OPERATIONS, above=OPERATIONS, seed=st.integers(0, 2**32))
def test_what_it_says_is_true(below: Operations, above: Operations, seed: int) -> None:
    """A chain of two, changed at random: each stretch reads as zeroes, and whole clusters that no
    layer ever held are found."""
    ctx = AioContext("test", native=False)
    ctx.adopt()
    images = Images(ctx)
    images.create("base", MIB, cluster_size=4 * KIB)
    source = random.Random(seed)
    lower = images.open("base")
    change(lower, below, source)
    lower.close()
    images.create("top", MIB, cluster_size=4 * KIB, backing_file="base", backing_fmt="qcow2")
    disk = images.open("top")
    change(disk, above, source)
    content = disk.read(0, MIB)
    offset = source.randrange(MIB - 4096)
    length = source.randrange(1, MIB - offset)
    end = offset
    for at, size in zeroes(disk, offset, length):
        assert at >= end
        end = at + size
        assert content[at:end] == bytes(size)
    assert end <= offset + length
    if not below and not above:
        assert zeroes(disk, offset, length) == [(offset, length)]
    disk.close()
    ctx.close()


def change(disk: Disk, operations: Operations, source: random.Random) -> None:
    for what, where, size in operations:
        offset = where * 4 * KIB + source.choice([0, 0, 512])
        length = min(size * source.choice([512, 4 * KIB]), MIB - offset)
        if what == "write":
            disk.write(offset, source.randbytes(length))
        elif what == "discard":
            disk.ctx.run(disk.node.pdiscard(offset, length))
        else:
            flags = RequestFlags.MAY_UNMAP if what == "unmap" else RequestFlags.NONE
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags))
