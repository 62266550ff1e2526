# SPDX-License-Identifier: Apache-2.0
"""Block status in bulk says of every sector what block status one by one says, in all kinds of
images and chains, and never that data is zeroes."""

from __future__ import annotations

import errno
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.chain_status import backing_node, chain_status
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from blockemu.drivers.qcow2.plain_entries import PlainEntries
from blockemu.drivers.status_runs import (
    ALLOCATED,
    BITS_MASK,
    DATA,
    DEPTH_SHIFT,
    StatusRuns,
    chain_runs,
    state_of,
)
from blockemu.drivers.status_runs import ZERO as READS_ZERO
from blockemu.loop.aio_context import AioContext
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

SECTOR = 512
DISK_BYTES = 200 * KIB

STEP = st.tuples(
    st.sampled_from(["write", "write", "write", "zero", "unmap", "discard", "compress"]),
    st.integers(0, DISK_BYTES // SECTOR - 1),
    st.one_of(st.integers(1, 8), st.integers(1, 200)),
)
LAYER = st.fixed_dictionaries(
    {
        "steps": st.lists(STEP, max_size=12),
        "bytes": st.sampled_from([DISK_BYTES, DISK_BYTES, 120 * KIB + 512, 60 * KIB]),
        "options": st.sampled_from(
            [
                {"cluster_size": 512},
                {"cluster_size": 4096},
                {"cluster_size": 16384},
                {"cluster_size": 4096, "compat": "0.10"},
                {"cluster_size": 16384, "extended_l2": "on"},
                {"cluster_size": 4096, "data_file": True},
            ]
        ),
        "looks_below": st.booleans(),
    }
)


def fill(disk: Disk, layer: dict[str, Any]) -> None:
    """Carry out the steps of a layer."""
    size = disk.node.length_bytes
    cluster = disk.driver.cluster_size
    for kind, sector, sectors in layer["steps"]:
        offset = sector * SECTOR % size
        length = min(sectors * SECTOR, size - offset)
        if kind == "write":
            disk.write(offset, b"\x11" * length)
        elif kind == "compress":
            if disk.driver.supports_compressed_writes:
                start = offset // cluster * cluster
                disk.write_compressed(start, b"\x22" * min(cluster, size - start))
        elif kind == "discard":
            disk.ctx.run(disk.node.pdiscard(offset, length))
        else:
            flags = RequestFlags.MAY_UNMAP if kind == "unmap" else RequestFlags.NONE
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags))
    disk.driver.image.preallocated = layer["looks_below"]


def make_chain(images: Images, layers: list[dict[str, Any]]) -> Disk:
    """The top of a chain of these layers, the base first."""
    below: Disk | None = None
    for number, layer in enumerate(layers):
        options, path = dict(layer["options"]), f"layer{number}"
        size = DISK_BYTES if number == len(layers) - 1 else layer["bytes"]
        if options.pop("data_file", False):
            options["data_file"] = f"data{number}"
        images.create(path, size, **options)
        more: dict[str, Any] = {"backing": below.node.node_name if below is not None else None}
        if "data_file" in options:
            more["data_file"] = {"driver": "file", "filename": options["data_file"]}
        below = images.open(path, **more)
        fill(below, layer)
    assert below is not None
    return below


async def expected_states(disk: Disk) -> list[int]:
    """The state of each sector, by questions for one extent at a time."""
    states: list[int] = []
    position, size = 0, disk.node.length_bytes
    while position < size:
        status = await chain_status(disk.node, position, size - position)
        found = disk.node
        for _ in range(status.depth):
            found = found.children["backing"].node
        state, depth = state_of(status), status.depth + 1
        if not status.allocated:
            # Past the end of a backing file, which counts as its own zeroes; or nowhere at all.
            behind = status.zero and backing_node(found) is not None
            state, depth = (READS_ZERO | ALLOCATED, depth + 1) if behind else (state, 0)
        states += [state | depth << DEPTH_SHIFT] * (status.length // SECTOR)
        position += status.length
    return states


async def states_in_bulk(disk: Disk, runs_max: int, start: int) -> list[int]:
    states: list[int] = []
    position, size = start, disk.node.length_bytes
    while position < size:
        runs = await chain_runs(disk.node, position, size - position, runs_max=runs_max)
        assert all(length > 0 for length in runs.lengths)
        assert all(one != other for one, other in zip(runs.states, runs.states[1:], strict=False))
        for length, state in zip(runs.lengths, runs.states, strict=True):
            states += [state] * (length // SECTOR)
        assert runs.length_bytes > 0
        position += runs.length_bytes
    return states


@given(
    layers=st.lists(LAYER, min_size=1, max_size=3),
    runs_max=st.sampled_from([1, 2, 20, 1000]),
    start=st.integers(0, DISK_BYTES // SECTOR - 1),
)
def test_bulk_says_what_single_questions_say(
    layers: list[dict[str, Any]], runs_max: int, start: int
) -> None:
    ctx = AioContext("test")
    ctx.adopt()
    try:
        disk = make_chain(Images(ctx), layers)
        expected = ctx.run(expected_states(disk))
        assert ctx.run(states_in_bulk(disk, runs_max, 0)) == expected
        assert ctx.run(states_in_bulk(disk, runs_max, start * SECTOR)) == expected[start:]
        content = disk.read(0, DISK_BYTES)
        for sector, state in enumerate(expected):
            if state & READS_ZERO:
                assert not any(content[sector * SECTOR : (sector + 1) * SECTOR])
        disk.close()
    finally:
        ctx.close()


def test_a_damaged_entry_ends_an_answer_and_fails_the_next(images: Images) -> None:
    images.create("disk", MIB)
    disk = images.open("disk")
    for cluster in range(4):
        disk.write(cluster * 64 * KIB, b"x" * 64 * KIB)
    disk.close()
    l2 = int.from_bytes(images["disk"].content[3 * 64 * KIB :][:8], "big") & OFFSET_MASK
    place = l2 + 2 * 8
    images["disk"].content[place : place + 8] = (1 << 50 | COPIED).to_bytes(8, "big")
    disk = images.open("disk", read_only=True)
    runs = disk.ctx.run(chain_runs(disk.node, 0, MIB, runs_max=100))
    assert (runs.lengths, runs.states) == ([128 * KIB], [ALLOCATED | DATA | 1 << DEPTH_SHIFT])
    with pytest.raises(OSError, match="disk") as failure:
        disk.ctx.run(chain_runs(disk.node, 128 * KIB, MIB - 128 * KIB, runs_max=100))
    assert failure.value.errno == errno.EIO
    disk.close()


# --- many entries at once ---

ENTRIES = st.lists(
    st.one_of(
        st.just(0),
        st.integers(1, 1000).map(lambda cluster: cluster << 16),
        st.integers(1, 1000).map(lambda cluster: cluster << 16 | COPIED),
        st.sampled_from([COPIED, ZERO, COMPRESSED | 77, 1 << 57, OFFSET_MASK, 5 << 16 | 512]),
    ),
    min_size=1,
    max_size=40,
)


@given(
    entries=ENTRIES,
    start=st.sampled_from([0, 1, 1 << 16, 500 << 16]),
    end=st.sampled_from([-1, 0, 1 << 16, 700 << 16, 1 << 40]),
    runs_max=st.sampled_from([0, 1, 3, 1 << 20]),
)
def test_plain_entries_are_told_apart(
    entries: list[int], start: int, end: int, runs_max: int
) -> None:
    odd = ZERO | COMPRESSED | 0x3F00_0000_0000_01FE | 0xFE00
    expected, taken = StatusRuns(), 0
    for word in entries:
        host = word & OFFSET_MASK
        if word & odd or (host and not start <= host < end):
            break
        if len(expected) == runs_max and (not expected or expected.states[-1] != bool(host)):
            break
        expected.add(1 << 16, bool(host))
        taken += 1
    plain = PlainEntries(odd=odd, cluster_size=1 << 16)
    words = array("Q", entries)
    found = plain.runs(words, start=start, end=end, runs_max=runs_max)
    assert (found[0], found[2]) == (taken, expected.lengths)
    if taken:
        assert found[1] == expected.states[0]


# --- runs ---


def test_runs_join_and_are_cut() -> None:
    runs = StatusRuns()
    runs.add(10, 1)
    runs.add(5, 1)
    runs.extend([1, 2, 3], [1, 2])
    runs.extend([4], [2, 1])
    assert (runs.lengths, runs.states) == ([16, 2, 3, 4], [1, 2, 1, 2])
    runs.cut(19)
    assert (runs.lengths, runs.states) == ([16, 2, 1], [1, 2, 1])
    runs.cut(100)
    runs.cut(16)
    assert (runs.lengths, runs.states) == ([16], [1])
    assert BITS_MASK == ALLOCATED | DATA | READS_ZERO


def test_a_cluster_that_is_partly_a_hole_may_fill_an_answer(images: Images) -> None:
    """As it falls to pieces there may be more runs than asked for, with plain entries behind."""
    images.create("disk", MIB)
    disk = images.open("disk")
    disk.write(0, b"x" * 256 * KIB)
    mapped = disk.ctx.run(disk.node.block_status(0, 64 * KIB)).host_offset
    assert mapped is not None
    images["disk"].holes.update(range(mapped // 4096, mapped // 4096 + 16, 2))
    disk.driver.image.preallocated = True
    expected = disk.ctx.run(expected_states(disk))
    for runs_max in (1, 2, 3, 15, 16, 17):
        assert disk.ctx.run(states_in_bulk(disk, runs_max, 0)) == expected
    disk.close()
