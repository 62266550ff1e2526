# SPDX-License-Identifier: Apache-2.0
"""Extended L2 entries: what is written and copied, what QEMU sees of it, what can't be right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.repair import Repair
from blockemu.drivers.qcow2.subclusters import (
    SUBCLUSTERS,
    alike,
    allocated_end,
    first_allocated,
    is_possible,
    span,
    with_data,
    with_zeroes,
)
from blockemu.img.map import json_line, walk
from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.structures import COPIED, OFFSET, Structures
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images, in_place
from tests.unit.drivers.qcow2.test_check import check

SIZE = MIB
CLUSTER = 64 * KIB
SUBCLUSTER = 2 * KIB
UNMAP = RequestFlags.MAY_UNMAP

BITMAPS = st.builds(
    lambda allocated, zero: allocated & ~zero | zero << 32,
    *(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 2**32 - 1])) for _ in range(2)),
)


def states(bitmap: int) -> list[str]:
    """Of each subcluster, bit by bit."""
    return [
        "data" if bitmap >> x & 1 else "zero" if bitmap >> (32 + x) & 1 else ""
        for x in range(SUBCLUSTERS)
    ]


@given(bitmap=BITMAPS, first=st.integers(0, 31), end=st.integers(0, 32))
def test_arithmetic_is_that_of_a_list_of_states(bitmap: int, first: int, end: int) -> None:
    found = states(bitmap)
    run = 1
    while first + run < SUBCLUSTERS and found[first + run] == found[first]:
        run += 1
    assert alike(bitmap, first) == run
    places = [x for x in range(SUBCLUSTERS) if found[x] == "data"]
    assert first_allocated(bitmap) == min(places, default=SUBCLUSTERS)
    assert allocated_end(bitmap) == max(places, default=-1) + 1
    assert is_possible(bitmap, has_host=True)
    assert is_possible(bitmap, has_host=False) is not bool(places)
    mask = span(min(first, end), end)
    for changed, state in ((with_data(bitmap, mask), "data"), (with_zeroes(bitmap, mask), "zero")):
        assert states(changed) == [
            state if first <= x < end else found[x] for x in range(SUBCLUSTERS)
        ]
        assert is_possible(changed, has_host=True)


def test_both_bits_of_one_subcluster_are_never_possible() -> None:
    for x in range(SUBCLUSTERS):
        assert not is_possible(1 << x | 1 << (32 + x), has_host=True)
        assert not is_possible(1 << x | 1 << (32 + x), has_host=False)


# --- what a write writes ---


def made(images: Images, *, backing: bool = True, **options: Any) -> Disk:
    """An empty image of 64 KiB clusters over a file of 0xbb."""
    if backing:
        images.files.add("base", b"\xbb" * SIZE)
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    images.create("image", SIZE, extended_l2="on", **options)
    disk = images.open("image")
    disk.driver.image.compressor.offload = in_place
    return disk


def entry(images: Images, index: int = 0) -> tuple[int, int]:
    """The words of an L2 entry as they are in the file."""
    image = Structures(images["image"].content)
    return image.get(image.l2_place(index)), image.get(image.l2_place(index) + 8)


def data_written(images: Images) -> list[tuple[int, int]]:
    """Offset and length of the writes since the log was cleared, behind the metadata."""
    log = images["image"].log
    return [(found.offset, found.length) for found in log if found.kind == "write"]


@pytest.mark.parametrize(
    ("offset", "length", "written", "bitmap"),
    [
        (4 * KIB, 4 * KIB, 4 * KIB, 0b1100),
        (5 * KIB, 512, SUBCLUSTER, 0b100),
        (3 * KIB, 2 * KIB, 2 * SUBCLUSTER, 0b110),
        (0, CLUSTER, CLUSTER, 2**32 - 1),
    ],
)
def test_write_touches_its_subclusters_alone(
    images: Images, offset: int, length: int, written: int, bitmap: int
) -> None:
    disk = made(images)
    images["image"].log.clear()
    disk.write(offset, b"x" * length)
    assert [count for _, count in data_written(images)] == [written]
    disk.flush()
    word, found = entry(images)
    assert found == bitmap
    assert word & COPIED
    wanted = b"\xbb" * offset + b"x" * length
    assert disk.read(0, CLUSTER) == wanted.ljust(CLUSTER, b"\xbb")


def test_second_write_to_a_cluster_goes_into_its_host_cluster(images: Images) -> None:
    disk = made(images)
    disk.write(0, b"x" * SUBCLUSTER)
    disk.flush()
    host = entry(images)[0] & OFFSET
    images["image"].log.clear()
    disk.write(9 * KIB, b"y" * 512)
    assert data_written(images) == [(host + 8 * KIB, SUBCLUSTER)]
    disk.flush()
    assert entry(images) == (host | COPIED, 0b10001)
    images["image"].log.clear()
    disk.write(9 * KIB, b"z" * 512)  # in place
    assert data_written(images) == [(host + 9 * KIB, 512)]
    content = b"x" * SUBCLUSTER + b"\xbb" * 7 * KIB + b"z" * 512
    assert disk.read(0, CLUSTER) == content.ljust(CLUSTER, b"\xbb")


def test_bits_reach_the_file_behind_the_data(images: Images) -> None:
    disk = made(images)
    disk.write(0, b"x" * SUBCLUSTER)
    disk.flush()
    images["image"].log.clear()
    disk.write(8 * KIB, b"y" * SUBCLUSTER)
    disk.flush()
    kinds = [found.kind for found in images["image"].log if found.kind != "read"]
    assert kinds == ["write", "flush", "write", "flush"]


def test_write_to_a_shared_cluster_moves_what_is_allocated(images: Images) -> None:
    disk = made(images)
    disk.write(8 * KIB, b"x" * (2 * SUBCLUSTER))
    disk.ctx.run(disk.driver.snapshot_create("one"))
    host = entry(images)[0]
    images["image"].log.clear()
    disk.write(20 * KIB, b"y" * SUBCLUSTER)
    # From the first that was allocated to the last that is written, in one.
    assert 14 * KIB in [count for _, count in data_written(images)]
    disk.flush()
    word, bitmap = entry(images)
    assert word & COPIED
    assert word & OFFSET != host & OFFSET
    assert bitmap == span(4, 11)
    content = b"\xbb" * 8 * KIB + b"x" * 4 * KIB + b"\xbb" * 8 * KIB + b"y" * 2 * KIB
    assert disk.read(0, CLUSTER) == content.ljust(CLUSTER, b"\xbb")


def test_write_into_a_compressed_cluster_moves_it_whole(images: Images, tmp_path: Path) -> None:
    disk = made(images, backing=False)
    disk.write_compressed(0, b"c" * CLUSTER)
    disk.write(10 * KIB, b"y" * 512)
    content = b"c" * 10 * KIB + b"y" * 512
    content = content.ljust(CLUSTER, b"c").ljust(SIZE, b"\0")
    disk.flush()
    assert entry(images)[1] == 2**32 - 1
    disk.write_compressed(0, content[:CLUSTER])
    disk.flush()
    assert entry(images)[1] == 0
    assert disk.read(0, SIZE) == content
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", content, tmp_path)


def test_zeroes_are_marked_by_the_subcluster(images: Images) -> None:
    disk = made(images)
    disk.write(0, b"x" * CLUSTER)
    disk.flush()
    host = entry(images)[0]
    images["image"].log.clear()
    disk.ctx.run(disk.node.pwrite_zeroes(8 * KIB, 4 * KIB))
    assert not data_written(images)
    disk.flush()
    assert entry(images) == (host, with_zeroes(2**32 - 1, span(4, 6)))
    disk.ctx.run(disk.node.pwrite_zeroes(0, CLUSTER))
    disk.flush()
    assert entry(images) == (host, (2**32 - 1) << 32)
    disk.ctx.run(disk.node.pwrite_zeroes(0, CLUSTER, UNMAP))
    disk.flush()
    assert entry(images) == (0, (2**32 - 1) << 32)
    assert disk.read(0, CLUSTER) == bytes(CLUSTER)


def test_write_that_fails_sets_no_bit(images: Images, tmp_path: Path) -> None:
    disk = made(images, backing=False)
    disk.write(0, b"x" * SUBCLUSTER)
    disk.flush()
    image = images["image"]
    image.fault = lambda kind, offset, length: 5 if kind == "write" else None
    for offset in (8 * KIB, 5 * CLUSTER):
        with pytest.raises(OSError, match="Input/output"):
            disk.write(offset, b"y" * SUBCLUSTER)
    image.fault = None
    assert disk.read(0, SIZE) == (b"x" * SUBCLUSTER).ljust(SIZE, b"\0")
    disk.close()
    images.check("image", tmp_path)


# --- beside QEMU ---


class Twins:
    """The same requests to an image of ours and, by qemu-io, to QEMU's; both begin as QEMU's."""

    def __init__(self, images: Images, folder: Path, *, backing: bool, options: str) -> None:
        self.images = images
        self.theirs = folder / "theirs"
        words = ["-o", f"extended_l2=on,{options}"]
        if backing:
            (folder / "base").write_bytes(b"\xbb" * SIZE)
            images.files.add("base", b"\xbb" * SIZE)
            words += ["-b", "base", "-F", "raw"]
        run_tool(["qemu-img", "create", "-q", "-f", "qcow2", *words, self.theirs, str(SIZE)])
        images.load("image", self.theirs)
        self.disk = images.open("image")

    def both(self, kind: str, offset: int, length: int, fill: int) -> None:
        disk, node = self.disk, self.disk.node
        command = f"write -P {fill}"
        if kind == "write":
            disk.write(offset, bytes((fill,)) * length)
        else:
            command = "write -z" if kind == "zero" else "write -z -u"
            flags = RequestFlags.NONE if kind == "zero" else UNMAP
            disk.ctx.run(node.pwrite_zeroes(offset, length, flags))
        run_tool(["qemu-io", "-f", "qcow2", "-c", f"{command} {offset} {length}", self.theirs])

    def snapshot(self, name: str) -> None:
        self.disk.ctx.run(self.disk.driver.snapshot_create(name))
        run_tool(["qemu-img", "snapshot", "-c", name, self.theirs])

    def maps(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Ours and theirs; of places, whether there is one: allocation need not go the same way."""

        async def lines() -> list[str]:
            return [json_line(found) async for found in walk(self.disk.node, 0)]

        shown = json.loads(f"[{','.join(self.disk.ctx.run(lines()))}]")
        told = run_tool(["qemu-img", "map", "-f", "qcow2", "--output=json", self.theirs]).stdout
        return tidy(shown), tidy(json.loads(told))


def tidy(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours that differ in their places alone as one."""
    found: list[dict[str, Any]] = []
    for shown in entries:
        shown["offset"] = "offset" in shown
        if found and all(
            shown[key] == found[-1][key] for key in shown if key not in ("start", "length")
        ):
            found[-1]["length"] += shown["length"]
        else:
            found.append(shown)
    return found


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=16k"])
@pytest.mark.parametrize("with_snapshot", [False, True], ids=["alone", "shared"])
def test_map_is_what_qemu_makes_of_the_same_requests(
    images: Images, tmp_path: Path, seed: int, options: str, with_snapshot: bool
) -> None:
    """With a backing file, where it shows what was written. Zeroes are of whole subclusters: QEMU
    marks one where only the rest of it is zero, ours writes them. No discards: QEMU's make zeroes
    of what isn't allocated."""
    rng = random.Random(f"{seed} {options} {with_snapshot}")
    twins = Twins(images, tmp_path, backing=True, options=options)
    done = []
    for number in range(25):
        kind = rng.choice(("write", "write", "write", "zero", "unmap"))
        offset = rng.randrange(SIZE // SUBCLUSTER) * SUBCLUSTER
        length = rng.choice((1, 1, 2, 5, 16, 32, 64, 90)) * SUBCLUSTER
        if kind == "write" and rng.random() < 0.4:
            offset += rng.randrange(SUBCLUSTER // 512) * 512
            length += rng.randrange(4) * 512
        length = min(length, SIZE - offset)
        done.append((kind, offset, length))
        twins.both(kind, offset, length, number + 1)
        if with_snapshot and number in (8, 16):
            twins.snapshot(f"s{number}")
        shown, told = twins.maps()
        if with_snapshot:  # QEMU keeps a shared host cluster's place for zeroes; ours lets go
            for found in (*shown, *told):
                found["offset"] = found["offset"] and found["data"]
            shown, told = tidy_again(shown), tidy_again(told)
        assert shown == told, done
    content = twins.disk.read(0, SIZE)
    twins.disk.close()
    images.check("image", tmp_path)
    images.compare("image", content, tmp_path)
    raw = tmp_path / "content.raw"
    raw.write_bytes(content)
    QemuImg.compare(twins.theirs, raw, one_fmt="qcow2")


def tidy_again(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for found in entries:
        if not found["offset"]:
            del found["offset"]
    return tidy(entries)


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_new_image_is_mapped_and_checked_as_theirs(
    images: Images, tmp_path: Path, preallocation: str, backing: bool
) -> None:
    twins = Twins(images, tmp_path, backing=backing, options=f"preallocation={preallocation}")
    twins.disk.close()
    twins.disk = made(images, backing=backing, preallocation=preallocation)
    shown, told = twins.maps()
    assert shown == told
    used = twins.disk.driver.image.refcounts.used_end
    twins.disk.write(3 * KIB, b"x" * 70 * KIB)
    if preallocation != "off":
        assert twins.disk.driver.image.refcounts.used_end == used
    content = twins.disk.read(0, SIZE)
    twins.disk.close()
    images.check("image", tmp_path)
    images.compare("image", content, tmp_path)


@pytest.mark.parametrize("length", [0, 512, 40 * KIB, 41 * KIB, 65 * KIB + 512])
def test_shrunk_disk_grows_again_with_zeroes(images: Images, tmp_path: Path, length: int) -> None:
    disk = made(images, backing=False)
    disk.write(0, b"x" * SIZE)
    disk.ctx.run(disk.node.truncate(length))
    disk.ctx.run(disk.node.truncate(2 * SIZE))
    content = (b"x" * length).ljust(2 * SIZE, b"\0")
    assert disk.read(0, 2 * SIZE) == content
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", content, tmp_path)


# --- the direct map ---


def test_direct_map_has_whole_clusters_only(images: Images) -> None:
    disk = made(images)
    direct = disk.driver.direct_map()
    assert direct is not None
    disk.write(0, b"x" * (CLUSTER - SUBCLUSTER))
    disk.read(0, 4 * KIB)
    assert not len(direct)
    disk.write(CLUSTER - SUBCLUSTER, b"y" * SUBCLUSTER)
    host = direct.lookup_write(0, CLUSTER)
    assert images["image"].content[host] == ord("x")
    assert images["image"].content[host + CLUSTER - 1] == ord("y")
    disk.write(2 * CLUSTER - SUBCLUSTER, b"z" * (CLUSTER + 2 * SUBCLUSTER))  # one whole, two not
    assert direct.lookup_read(2 * CLUSTER, CLUSTER) >= 0
    assert direct.lookup_read(2 * CLUSTER - SUBCLUSTER, 512) == -1
    assert direct.lookup_read(3 * CLUSTER, 512) == -1


def test_mapping_is_withdrawn_before_a_subcluster_is_marked(images: Images) -> None:
    disk = made(images)
    direct = disk.driver.direct_map()
    assert direct is not None
    disk.write(0, b"x" * (2 * CLUSTER))
    assert direct.lookup_read(0, 512) >= 0
    disk.ctx.run(disk.node.pwrite_zeroes(4 * KIB, 4 * KIB))
    assert direct.lookup_read(0, 512) == -1
    assert direct.lookup_read(CLUSTER, 512) >= 0
    disk.read(0, 2 * KIB)
    assert direct.lookup_read(0, 512) == -1


# --- what can't be right ---


def damaged(images: Images, word: int | None, bitmap: int) -> Disk:
    """An image whose first entry has this bitmap, and this word unless None."""
    disk = made(images)
    disk.write(0, b"x" * CLUSTER)
    disk.close()
    image = Structures(images["image"].content)
    if word is not None:
        image.put(image.l2_place(), word)
    image.put(image.l2_place() + 8, bitmap)
    return images.open("image")


@pytest.mark.parametrize(
    ("word", "bitmap"), [(None, 1 << 32 | 1), (None, 2**64 - 1), (0, 1), (0, 1 << 33 | 2)]
)
def test_impossible_bitmap_ends_the_request(
    images: Images, word: int | None, bitmap: int, caplog: pytest.LogCaptureFixture
) -> None:
    disk = damaged(images, word, bitmap)
    for request in (
        lambda: disk.read(0, 512),
        lambda: disk.write(0, b"y" * 512),
        lambda: disk.ctx.run(disk.node.pwrite_zeroes(0, SUBCLUSTER)),
        lambda: disk.ctx.run(disk.node.pdiscard(0, CLUSTER)),
    ):
        with pytest.raises(OSError, match="which is not possible with"):
            request()
    assert f"bitmap {bitmap:#018x}" in caplog.text
    assert disk.read(CLUSTER, 512) == b"\xbb" * 512


@pytest.mark.parametrize(("word", "bitmap"), [(None, 1 << 32 | 1), (0, 1), (0, 1 << 32 | 1)])
def test_impossible_bitmap_is_a_corruption_that_no_repair_guesses_at(
    images: Images, word: int | None, bitmap: int
) -> None:
    damaged(images, word, bitmap).close()
    before = entry(images)
    result, lines = check(images, Repair.ALL)
    assert result.corruptions == 1
    assert any(f"has the bitmap {bitmap:#018x} for" in line for line in lines)
    assert entry(images) == before


def test_bitmap_of_a_compressed_cluster_is_cleared_and_its_data_kept(
    images: Images, tmp_path: Path
) -> None:
    """qemu-img takes the data for a leak, and gives it away in a repair."""
    disk = made(images, backing=False)
    disk.write_compressed(0, b"c" * CLUSTER)
    disk.close()
    image = Structures(images["image"].content)
    image.put(image.l2_place() + 8, 5)
    result, _ = check(images)
    assert (result.corruptions, result.leaks) == (1, 0)
    result, _ = check(images, Repair.ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert entry(images)[1] == 0
    images.check("image", tmp_path)
    images.compare("image", (b"c" * CLUSTER).ljust(SIZE, b"\0"), tmp_path)


def test_cluster_without_data_loses_a_place_that_is_not_aligned(
    images: Images, tmp_path: Path
) -> None:
    disk = made(images)
    disk.write(0, b"x" * CLUSTER)
    disk.ctx.run(disk.node.pwrite_zeroes(0, CLUSTER))
    disk.close()
    image = Structures(images["image"].content)
    image.put(image.l2_place(), image.get(image.l2_place()) | 512)
    result, _ = check(images, Repair.ALL)
    assert result.is_clean
    assert entry(images) == (0, (2**32 - 1) << 32)
    assert images.open("image").read(0, CLUSTER) == bytes(CLUSTER)
    (tmp_path / "base").write_bytes(b"\xbb" * SIZE)
    images.check("image", tmp_path)


@pytest.mark.parametrize("cluster_bits", [9, 13])
def test_clusters_too_small_for_subclusters_are_refused(images: Images, cluster_bits: int) -> None:
    images.create("image", MIB, cluster_size=1 << cluster_bits)
    images["image"].content[79] |= 1 << 4
    with pytest.raises(ImageError, match=f"clusters of {1 << cluster_bits} bytes are not possible"):
        images.open("image", read_only=True)
