# SPDX-License-Identifier: Apache-2.0
"""Random requests and snapshots against plain byte arrays; QEMU has the last word."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.aio_context import AioContext
from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, Disk, Images

DISK_BYTES = 200 * KIB + 512
GROWTH = 70 * KIB


class Step(NamedTuple):
    kind: str
    offset: int
    length: int
    number: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(
            ["write"] * 4
            + ["zero", "unmap", "discard", "flush", "reopen", "grow"]
            + ["create", "create", "apply", "delete"]
        ),
        st.integers(0, DISK_BYTES - 1),
        st.one_of(st.integers(1, 3000), st.integers(1, 100_000), st.just(4096)),
        st.integers(1, 255),
    ),
    max_size=30,
)
FORMATS = st.one_of(
    st.fixed_dictionaries(
        {
            "cluster_size": st.sampled_from([512, 1024, 4096, 65536, 1 << 21]),
            "refcount_bits": st.sampled_from([8, 16, 32, 64]),
        }
    ),
    st.fixed_dictionaries(
        {"cluster_size": st.sampled_from([16384, 65536, 1 << 21]), "extended_l2": st.just("on")}
    ),
    st.fixed_dictionaries(
        {"cluster_size": st.sampled_from([512, 4096, 65536]), "compat": st.just("0.10")}
    ),
)


class Model:
    """What the disk holds, and each snapshot by its id."""

    def __init__(self, images: Images, content: bytes, *, can_grow: bool) -> None:
        self.images = images
        self.content = bytearray(content)
        self.snapshots: dict[str, bytes] = {}
        self.can_grow = can_grow

    def play(self, disk: Disk, step: Step) -> Disk:
        end = min(step.offset + step.length, len(self.content))
        offset, length = step.offset, end - step.offset
        if step.kind == "write":
            disk.write(offset, bytes((step.number,)) * length)
            self.content[offset:end] = bytes((step.number,)) * length
        elif step.kind in ("zero", "unmap"):
            flags = RequestFlags.MAY_UNMAP if step.kind == "unmap" else RequestFlags.NONE
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags))
            self.content[offset:end] = bytes(length)
        elif step.kind == "discard":
            disk.ctx.run(disk.node.pdiscard(offset, length))
            self.content[offset:end] = disk.read(offset, length)
        elif step.kind == "flush":
            disk.flush()
        elif step.kind == "reopen":
            disk.close()
            return self.images.open("image")
        elif step.kind == "grow":
            self.grow(disk)
        else:
            self.change(disk, step)
        return disk

    def grow(self, disk: Disk) -> None:
        if self.can_grow:
            self.content.extend(bytes(GROWTH))
            disk.ctx.run(disk.node.truncate(len(self.content)))

    def change(self, disk: Disk, step: Step) -> None:
        if step.kind == "create":
            own_id = str(max((int(other) for other in self.snapshots), default=0) + 1)
            disk.ctx.run(disk.driver.snapshot_create(f"name{own_id}"))
            self.snapshots[own_id] = bytes(self.content)
        elif self.snapshots:
            own_id = sorted(self.snapshots)[step.number % len(self.snapshots)]
            if step.kind == "apply":
                disk.ctx.run(disk.driver.snapshot_apply(own_id))
                self.content = bytearray(self.snapshots[own_id])
            else:
                disk.ctx.run(disk.driver.snapshot_delete(f"name{own_id}"))
                del self.snapshots[own_id]
        assert [entry.id for entry in disk.driver.snapshots] == list(self.snapshots)

    def verify(self, disk: Disk) -> None:
        assert disk.node.length_bytes == len(self.content)
        assert disk.read(0, len(self.content)) == self.content
        disk.close()
        for own_id, content in self.snapshots.items():
            shown = self.images.open("image", read_only=True, snapshot=own_id)
            assert shown.node.length_bytes == len(content)
            assert shown.read(0, len(content)) == content
            shown.close()
        judged = Checker(self.images["image"].content)
        assert not judged.corruptions
        assert not judged.leaks


@given(options=FORMATS, steps=STEPS, with_base=st.booleans())
def test_disk_and_snapshots_hold_what_byte_arrays_hold(
    options: dict[str, int | str], steps: list[Step], with_base: bool
) -> None:
    ctx = AioContext("test")
    ctx.adopt()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(Images(ctx), options, steps, Path(folder), with_base=with_base)
    finally:
        ctx.close()


def run(
    images: Images,
    options: dict[str, int | str],
    steps: list[Step],
    folder: Path,
    *,
    with_base: bool,
) -> None:
    base = bytes(range(1, 256)) * 500 if with_base else b""
    if with_base:
        images.files.add("base", base)
        (folder / "base").write_bytes(base)
        options = {**options, "backing_file": "base", "backing_fmt": "raw"}
    images.create("image", DISK_BYTES, **options)
    model = Model(images, base + bytes(DISK_BYTES - len(base)), can_grow="compat" not in options)
    disk = images.open("image")
    for step in steps:
        disk = model.play(disk, step)
    model.verify(disk)
    images.check("image", folder)
    images.compare("image", model.content, folder)
    if model.snapshots:
        go_on_with_qemu(images, model, folder)


def go_on_with_qemu(images: Images, model: Model, folder: Path) -> None:
    """QEMU goes to the last snapshot and deletes the first; we find it so."""
    saved = images.save("image", folder)
    last = list(model.snapshots)[-1]
    run_tool(["qemu-img", "snapshot", "-a", last, saved])
    first = next(iter(model.snapshots))
    run_tool(["qemu-img", "snapshot", "-d", f"name{first}", saved])
    verdict = QemuImg.check(saved)
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text
    model.content = bytearray(model.snapshots[last])
    del model.snapshots[first]
    images.load("image", saved)
    model.verify(images.open("image"))
