# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps: read when an image is opened, in use meanwhile, stored when it is closed."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers import bitmap_commands
from blockemu.drivers.dirty_bitmap import DirtyBitmap
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2 import bitmap_store
from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

AUTO, IN_USE = 2, 1


def add(disk: Disk, name: str, **options: Any) -> DirtyBitmap:
    return disk.ctx.run(bitmap_commands.add(disk.node, name, persistent=True, **options))


def listed(images: Images) -> dict[str, tuple[int, list[int]]]:
    return Checker(images["image"].content).bitmaps()


def ranges(disk: Disk, name: str) -> list[tuple[int, int]]:
    bitmap = disk.ctx.run(disk.driver.load_bitmap(name))
    assert bitmap is not None
    return list(bitmap.ranges())


@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 << 20])
def test_what_is_written_is_in_the_bitmap_when_the_image_is_opened_again(
    images: Images, tmp_path: Path, cluster: int
) -> None:
    images.create("image", 8 * MIB, cluster_size=cluster)
    disk = images.open("image")
    add(disk, "b", granularity=4 * KIB)
    add(disk, "off", enabled=False)
    disk.write(5 * KIB, b"x")
    disk.write(3 * MIB, b"y" * 64 * KIB)
    disk.close()
    images.check("image", tmp_path)
    assert listed(images) == {"b": (AUTO, [1, *range(768, 784)]), "off": (0, [])}
    again = images.open("image")
    wanted = [(4 * KIB, 4 * KIB), (3 * MIB, 64 * KIB)]
    assert ranges(again, "b") == wanted
    assert {name: flags for name, (flags, _) in listed(images).items()} == {
        "b": AUTO | IN_USE, "off": 0,
    }  # fmt: skip
    again.close()
    assert listed(images)["b"][0] == AUTO
    images.check("image", tmp_path)


def test_bitmap_of_an_image_that_was_not_closed_is_inconsistent(
    images: Images, tmp_path: Path
) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b")
    add(disk, "off", enabled=False)
    disk.close()
    disk = images.open("image")
    disk.write(0, b"x")
    disk.abandon()
    disk = images.open("image")
    for change in (bitmap_commands.clear, bitmap_commands.enable, bitmap_commands.disable):
        with pytest.raises(ImageError, match="'b' is inconsistent"):
            disk.ctx.run(change(disk.node, "b"))
    disk.ctx.run(bitmap_commands.enable(disk.node, "off"))
    disk.write(MIB - 1, b"x")
    with pytest.raises(OSError, match="'b' is inconsistent: remove it"):
        disk.ctx.run(disk.node.truncate(2 * MIB))
    disk.close()
    assert listed(images) == {"b": (AUTO | IN_USE, []), "off": (AUTO, [15])}
    disk = images.open("image")
    disk.ctx.run(bitmap_commands.remove(disk.node, "b"))
    disk.close()
    assert list(listed(images)) == ["off"]
    images.check("image", tmp_path)


def test_read_only_image_stays_as_it_is_and_bitmaps_can_be_read(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b")
    disk.write(100 * KIB, b"x")
    disk.close()
    before = bytes(images["image"].content)
    disk = images.open("image", read_only=True)
    assert ranges(disk, "b") == [(64 * KIB, 64 * KIB)]
    assert disk.ctx.run(disk.driver.load_bitmap("c")) is None
    for change in (bitmap_commands.clear, bitmap_commands.remove, bitmap_commands.enable):
        with pytest.raises(ImageError, match="'b' is readonly"):
            disk.ctx.run(change(disk.node, "b"))
    disk.close()
    assert images["image"].content == before


def test_change_of_a_bitmap_that_does_not_record_is_marked_first(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b", enabled=False)
    disk.close()
    disk = images.open("image")
    assert listed(images)["b"][0] == 0
    disk.ctx.run(bitmap_commands.enable(disk.node, "b"))
    assert listed(images)["b"][0] == IN_USE
    disk.close()
    assert listed(images)["b"][0] == AUTO


def test_bitmaps_follow_the_size_of_the_disk(images: Images, tmp_path: Path) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b")
    add(disk, "off", enabled=False)
    disk.write(0, b"x" * MIB)
    disk.close()
    disk = images.open("image")
    disk.ctx.run(disk.node.truncate(65 * KIB))
    disk.ctx.run(disk.node.truncate(700 * MIB))
    disk.write(699 * MIB, b"x")
    assert ranges(disk, "b") == [(0, 128 * KIB), (699 * MIB, 64 * KIB)]
    disk.close()
    images.check("image", tmp_path)
    disk = images.open("image")
    assert ranges(disk, "b") == [(0, 128 * KIB), (699 * MIB, 64 * KIB)]
    disk.close()


def test_snapshots_are_made_beside_bitmaps_but_not_gone_back_to(
    images: Images, tmp_path: Path
) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b")
    disk.write(0, b"x")
    disk.ctx.run(disk.driver.snapshot_create("s"))
    disk.close()
    disk = images.open("image")
    with pytest.raises(ImageError, match="has dirty bitmaps"):
        disk.ctx.run(disk.driver.snapshot_apply("s"))
    disk.ctx.run(disk.driver.snapshot_delete("s"))
    assert ranges(disk, "b") == [(0, 64 * KIB)]
    disk.close()
    images.check("image", tmp_path)
    assert listed(images) == {"b": (AUTO, [0])}


def test_snapshot_that_is_shown_has_no_bitmaps(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    disk.ctx.run(disk.driver.snapshot_create("s"))
    add(disk, "b")
    disk.ctx.run(disk.node.truncate(1024 * MIB))
    disk.close()
    disk = images.open("image", read_only=True, snapshot="s")
    assert disk.ctx.run(disk.driver.load_bitmap("b")) is None
    disk.close()


def test_writer_that_knows_no_bitmaps_makes_them_void(images: Images, tmp_path: Path) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b")
    disk.close()
    images["image"].content[95] = 0
    disk = images.open("image")
    assert not disk.node.dirty_bitmaps
    add(disk, "b")
    add(disk, "c")
    disk.close()
    assert listed(images) == {"b": (AUTO, []), "c": (AUTO, [])}
    verdict = QemuImg.check(images.save("image", tmp_path))
    assert (verdict.corruptions, verdict.leaks) == (0, 2)


def test_full_disk_leaves_bitmaps_as_they_were(images: Images, tmp_path: Path) -> None:
    images.create("image", MIB, cluster_size=4096)
    disk = images.open("image")
    bitmap = add(disk, "b", granularity=512)
    disk.write(0, b"x")
    disk.close()
    disk = images.open("image")
    disk.write(MIB - 1, b"x")
    image = images["image"]
    image.fault = lambda kind, offset, length: (
        errno.ENOSPC if kind in ("write", "truncate") else None
    )
    with pytest.raises(OSError, match="No space"):
        disk.ctx.run(disk.driver.store_bitmaps())
    image.fault = None
    assert listed(images)["b"][0] == AUTO | IN_USE
    assert bitmap.name in disk.node.dirty_bitmaps
    disk.close()
    assert listed(images) == {"b": (AUTO, [0, 2047])}
    images.check("image", tmp_path)


@pytest.mark.parametrize(
    ("work", "flush", "still_writes"),
    [("remove", 1, True), ("remove", 2, False), ("store", 1, False)],
    ids=["what-is-new", "header", "marks"],
)
def test_flush_that_fails_when_bitmaps_are_stored_ends_writing(
    images: Images, tmp_path: Path, work: str, flush: int, still_writes: bool
) -> None:
    """But not before the disk may have what is new."""
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b")
    add(disk, "c")
    disk.close()
    disk = images.open("image")
    image, flushes = images["image"], 0

    def fault(kind: str, offset: int, length: int) -> int | None:
        nonlocal flushes
        flushes += kind == "flush"
        return errno.EIO if kind == "flush" and flushes >= flush else None

    image.fault = fault
    remove = bitmap_commands.remove(disk.node, "c")
    change = remove if work == "remove" else disk.driver.store_bitmaps()
    with pytest.raises(OSError, match="Input/output error"):
        disk.ctx.run(change)
    remove.close()
    image.fault = None
    if still_writes:
        disk.write(0, b"x")
    else:
        with pytest.raises(OSError, match="bitmaps are on the disk is not known"):
            disk.write(0, b"x")
    disk.close()
    verdict = QemuImg.check(images.save("image", tmp_path))
    assert (verdict.corruptions, verdict.errors) == (0, 0), verdict.text


def test_stored_bitmaps_end_writing(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    add(disk, "b")
    disk.ctx.run(disk.driver.store_bitmaps())
    with pytest.raises(OSError, match="being closed"):
        disk.write(0, b"x")
    disk.close()
    assert listed(images) == {"b": (AUTO, [])}


def test_disk_of_no_bytes_can_store_none(images: Images) -> None:
    images.create("image", 0)
    disk = images.open("image")
    with pytest.raises(ImageError, match="0 bytes can't have stored bitmaps"):
        add(disk, "b")
    disk.ctx.run(disk.node.truncate(MIB))
    add(disk, "b")
    with pytest.raises(OSError, match="0 bytes can't have stored bitmaps"):
        disk.ctx.run(disk.node.truncate(0))
    disk.close()
    assert listed(images) == {"b": (AUTO, [])}


def test_version_2_can_store_none(images: Images) -> None:
    images.create("image", MIB, compat="0.10")
    disk = images.open("image")
    with pytest.raises(ImageError, match="version 2"):
        add(disk, "b")
    disk.close()


def test_ones_and_zeroes_take_no_space(images: Images, tmp_path: Path) -> None:
    images.create("image", 64 * MIB, cluster_size=512)
    disk = images.open("image")
    add(disk, "b", granularity=512)
    disk.ctx.run(disk.node.pwrite_zeroes(0, 32 * MIB + 512))
    disk.close()
    assert listed(images)["b"][1] == list(range(65537))
    directory = images.open("image", read_only=True).driver.image.header_file.bitmaps
    entry = directory.entries[0]
    words = Checker(images["image"].content).words(entry.table_offset, entry.table_entries)
    assert words[:16] == (1,) * 16
    assert words[16] > 1
    assert not any(words[17:])
    images.check("image", tmp_path)


def test_bitmaps_are_part_of_the_memory_of_an_image(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.create("image", 256 * MIB)
    disk = images.open("image")
    add(disk, "b", granularity=512)
    disk.write(0, b"x")
    disk.write(255 * MIB, b"x")
    assert disk.driver.metadata_share.parts["bitmaps"].used() == 2 * 4096
    disk.close()
    disk = images.open("image")
    part = disk.driver.metadata_share.parts["bitmaps"]
    assert part.bytes_max >= 64 * KIB
    assert part.used() == 2 * 4096
    disk.close()
    monkeypatch.setattr(bitmap_store, "LOADED_BYTES_MAX", 4096)
    with pytest.raises(ImageError, match="bitmap 'b' takes more memory than"):
        images.open("image")
    assert listed(images)["b"][0] == AUTO


def test_random_life_beside_a_model(images: Images, tmp_path: Path, seed: int) -> None:
    """Bitmaps of ours and of QEMU's in turn: what they hold is what was written."""
    rng = random.Random(seed)
    images.create("image", MIB, cluster_size=rng.choice((512, 4096, 65536)))
    model: dict[str, tuple[int, bool, set[int]]] = {}
    for _ in range(6):
        disk = images.open("image")
        for _ in range(4):
            step(disk, rng, model)
        disk.close()
        images.check("image", tmp_path)
        found = {name: (flags, set(dirty)) for name, (flags, dirty) in listed(images).items()}
        assert found == {
            name: (AUTO if enabled else 0, dirty) for name, (_, enabled, dirty) in model.items()
        }
        saved = images.save("image", tmp_path)
        offset = rng.randrange(0, MIB - 4096, 512)
        QemuIo(saved, fmt="qcow2").run(f"write {offset} 4096")
        mark(model, offset, 4096)
        if model and rng.random() < 0.5:
            name = rng.choice(list(model))
            run_tool(["qemu-img", "bitmap", "--clear", saved, name])
            model[name][2].clear()
        images.load("image", saved)


def step(disk: Disk, rng: random.Random, model: dict[str, tuple[int, bool, set[int]]]) -> None:
    what = rng.choice(["add", "write", "write", "zero", "clear", "switch", "remove", "merge"])
    if what == "add" and len(model) < 5:
        name, granularity = f"bitmap-{rng.randrange(1000)}", 512 << rng.randrange(9)
        if name not in model:
            enabled = rng.random() < 0.7
            add(disk, name, granularity=granularity, enabled=enabled)
            model[name] = (granularity, enabled, set())
    elif what in ("write", "zero"):
        offset, length = rng.randrange(MIB - 70_000), rng.choice((1, 512, 5000, 70_000))
        if what == "write":
            disk.write(offset, b"w" * length)
        else:
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length))
        mark(model, offset, length)
    elif model:
        change(disk, rng, model, what)


def change(
    disk: Disk, rng: random.Random, model: dict[str, tuple[int, bool, set[int]]], what: str
) -> None:
    name = rng.choice(list(model))
    granularity, enabled, dirty = model[name]
    if what == "clear":
        disk.ctx.run(bitmap_commands.clear(disk.node, name))
        dirty.clear()
    elif what == "switch":
        verb = bitmap_commands.disable if enabled else bitmap_commands.enable
        disk.ctx.run(verb(disk.node, name))
        model[name] = (granularity, not enabled, dirty)
    elif what == "remove":
        disk.ctx.run(bitmap_commands.remove(disk.node, name))
        del model[name]
    elif what == "merge":
        source = rng.choice(list(model))
        taken = disk.ctx.run(bitmap_commands.find(disk.node, source))
        disk.ctx.run(bitmap_commands.merge(disk.node, name, taken))
        theirs = model[source][0]
        for bit in sorted(model[source][2]):
            mark({name: (granularity, True, dirty)}, bit * theirs, theirs)


def mark(model: dict[str, tuple[int, bool, set[int]]], offset: int, length: int) -> None:
    for granularity, enabled, dirty in model.values():
        if enabled:
            dirty.update(range(offset // granularity, (offset + length - 1) // granularity + 1))
