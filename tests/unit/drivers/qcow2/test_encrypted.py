# SPDX-License-Identifier: Apache-2.0
"""Encrypted images that we make and write: against a byte array, beside QEMU, after power cuts."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.crypto.offload import in_place
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.qcow2.create import create
from blockemu.drivers.qcow2.create_options import CreateOptions
from blockemu.loop.memory_file import MemoryImage
from tests.peers.qemu import run_tool
from tests.unit.drivers.crypto.luks_samples import SECRET, sample
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import SECTOR, CutDisk, GuestHistory
from tests.unit.drivers.qcow2.support import KIB, Disk, Images
from tests.unit.drivers.qcow2.test_crash import DISK_BYTES, run_workload

UNLOCK = {"encrypt.key-secret": "sec0"}
STEPS = 60
CUTS = 40


@pytest.fixture
def encrypted(images: Images) -> Images:
    images.opener.offload = in_place
    images.opener.secrets.add("sec0", SECRET)
    return images


def create_luks(
    images: Images, path: str, size: int, *, cipher: tuple[str, str] = ("aes-256", "xts"),
    **options: Any,
) -> MemoryImage:  # fmt: skip
    """A new encrypted image, whose PBKDF2 takes no time."""
    image = images.files.add(path)
    _, area, _ = sample(*cipher)
    wanted = {
        "encrypt.format": "luks", "encrypt.cipher-alg": cipher[0],
        "encrypt.cipher-mode": cipher[1], **options,
    }  # fmt: skip

    async def make() -> None:
        node = await images.opener.open({"driver": "file", "filename": path})
        backend = BlockBackend(path, node, writable=True)
        await create(node, path, CreateOptions.parse(path, size, wanted), luks_area=area)
        await backend.close()

    images.ctx.run(make())
    return image


class Qemu:
    """QEMU's tools on an encrypted image in a folder."""

    def __init__(self, folder: Path, path: Path) -> None:
        secret = folder / "secret"
        secret.write_bytes(SECRET)
        self.objects = ["--object", f"secret,id=sec0,file={secret}"]
        self.tree = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}"
        self.folder = folder

    def check(self) -> None:
        told = run_tool(
            ["qemu-img", "check", "--output=json", *self.objects, "--image-opts", self.tree]
        )
        facts = json.loads(told.stdout)
        assert not facts.get("corruptions") and not facts.get("leaks"), facts  # noqa: PT018

    def compare(self, content: bytes | bytearray) -> None:
        raw = self.folder / "content.raw"
        raw.write_bytes(content)
        run_tool(["qemu-img", "compare", *self.objects, "--image-opts", self.tree,
                  f"driver=raw,file.filename={raw}"])  # fmt: skip

    def io(self, *commands: str) -> None:
        words = [word for command in commands for word in ("-c", command)]
        told = run_tool(["qemu-io", *self.objects, "--image-opts", self.tree, *words])
        assert "failed" not in told.stdout, told.stdout


def random_steps(disk: Disk, rng: random.Random, model: bytearray) -> None:
    """Requests one after the other, each carried out on `model`, too; every read is compared."""
    for _ in range(STEPS):
        offset = rng.randrange(len(model))
        length = min(rng.choice((1, 511, 512, 3000, 4096, 70_000)), len(model) - offset)
        end = offset + length
        kind = rng.choice(("write", "write", "zero", "unmap", "read", "snapshot"))
        if kind == "write":
            model[offset:end] = rng.randbytes(length)
            disk.write(offset, bytes(model[offset:end]))
        elif kind in ("zero", "unmap"):
            model[offset:end] = bytes(length)
            flags = RequestFlags.MAY_UNMAP if kind == "unmap" else RequestFlags.NONE
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags))
        elif kind == "snapshot" and len(disk.driver.snapshots) < 3:
            disk.ctx.run(disk.driver.snapshot_create(f"s{len(disk.driver.snapshots)}"))
        else:
            assert disk.read(offset, length) == model[offset:end]
    assert disk.read(0, len(model)) == model


@pytest.mark.parametrize(
    ("cipher", "options"),
    [
        (("aes-256", "xts"), {"cluster_size": 512}),
        (("aes-256", "xts"), {"cluster_size": 65536, "refcount_bits": 64}),
        (("aes-128", "xts"), {"cluster_size": 4096, "compat": "0.10"}),
        (("aes-256", "cbc"), {"cluster_size": 2 << 20}),
        (("aes-128", "ctr"), {"cluster_size": 4096, "lazy_refcounts": True}),
        (("cast5-128", "cbc"), {"cluster_size": 16384}),
    ],
    ids=str,
)
def test_what_we_write_qemu_reads_and_the_reverse(
    encrypted: Images, seed: int, cipher: tuple[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    model = bytearray(300 * KIB + 512)
    create_luks(encrypted, "image", len(model), cipher=cipher, **options)
    disk = encrypted.open("image", **UNLOCK)

    random_steps(disk, rng, model)

    disk.close()
    path = encrypted.save("image", tmp_path)
    qemu = Qemu(tmp_path, path)
    qemu.check()
    qemu.compare(model)
    offset = rng.randrange(200) * SECTOR
    qemu.io(f"write -P 0x5a {offset} 70000")
    model[offset : offset + 70000] = b"\x5a" * 70000
    encrypted.load("image", path)
    disk = encrypted.open("image", read_only=True, **UNLOCK)
    assert disk.read(0, len(model)) == model
    disk.close()


def test_nothing_of_the_guest_stands_in_the_file(encrypted: Images) -> None:
    image = create_luks(encrypted, "image", 256 * KIB)
    disk = encrypted.open("image", **UNLOCK)
    disk.write(1000, b"the guest's own bytes" * 100)
    disk.close()
    assert b"own bytes" not in image.content


def test_an_overlay_is_encrypted_and_its_backing_file_is_not(
    encrypted: Images, tmp_path: Path
) -> None:
    encrypted.create("base", 256 * KIB)
    base = encrypted.open("base")
    base.write(0, b"\x11" * 256 * KIB)
    base.close()
    create_luks(encrypted, "image", 256 * KIB, backing_file="base", backing_fmt="qcow2")
    disk = encrypted.open("image", **UNLOCK)

    disk.write(70 * KIB, b"\x22" * 1000)

    wanted = bytearray(b"\x11" * 256 * KIB)
    wanted[70 * KIB : 70 * KIB + 1000] = b"\x22" * 1000
    assert disk.read(0, 256 * KIB) == wanted
    disk.close()
    encrypted.save("base", tmp_path)
    qemu = Qemu(tmp_path, encrypted.save("image", tmp_path))
    qemu.check()
    qemu.compare(wanted)


@pytest.mark.parametrize("preallocation", ["metadata", "full"])
def test_preallocated_clusters_read_as_zeroes(
    encrypted: Images, preallocation: str, tmp_path: Path
) -> None:
    create_luks(encrypted, "image", 1000 * KIB, preallocation=preallocation)
    disk = encrypted.open("image", **UNLOCK)
    disk.write(100 * KIB, b"\x33" * 1000)

    wanted = bytearray(1000 * KIB)
    wanted[100 * KIB : 100 * KIB + 1000] = b"\x33" * 1000
    assert disk.read(0, 1000 * KIB) == wanted
    disk.close()
    qemu = Qemu(tmp_path, encrypted.save("image", tmp_path))
    qemu.check()
    qemu.compare(wanted)


def test_growth_is_refused_with_preallocation_only(encrypted: Images) -> None:
    """Host clusters of zeroes would be noise to the guest, as they are in QEMU 7.2."""
    create_luks(encrypted, "image", 64 * KIB)
    disk = encrypted.open("image", **UNLOCK)
    with pytest.raises(OSError, match="preallocation when an encrypted disk grows") as caught:
        disk.ctx.run(disk.node.truncate(1000 * KIB, preallocation="metadata"))
    assert caught.value.errno == errno.ENOTSUP
    assert disk.node.length_bytes == 64 * KIB
    disk.ctx.run(disk.node.truncate(1000 * KIB))
    assert disk.read(0, 1000 * KIB) == bytes(1000 * KIB)


def test_a_disk_that_ends_inside_a_sector(encrypted: Images) -> None:
    """Others make such images."""
    image = create_luks(encrypted, "image", 64 * KIB)
    image.content[24:32] = (64 * KIB - 100).to_bytes(8, "big")
    disk = encrypted.open("image", **UNLOCK)

    disk.write(63 * KIB, b"\x44" * (KIB - 100))

    assert disk.read(63 * KIB, KIB - 100) == b"\x44" * (KIB - 100)
    assert disk.read(62 * KIB, KIB) == bytes(KIB)
    disk.close()


def test_the_luks_header_is_never_handed_out(encrypted: Images) -> None:
    """Though its refcounts say that it is free."""
    image = create_luks(encrypted, "image", 4 << 20)
    disk = encrypted.open("image", **UNLOCK)
    area = disk.driver.image.header.crypto_area
    block = disk.driver.image.reftable.words[0]
    disk.close()
    assert area is not None
    first = area.offset >> 16
    image.content[block + 2 * first : block + 2 * first + 20] = bytes(20)
    before = bytes(image.content[area.offset :][: area.length])

    disk = encrypted.open("image", **UNLOCK)
    with pytest.raises(OSError, match="holds the header"):
        disk.write(0, b"\x55" * (4 << 20))
    disk.close()

    assert image.content[area.offset :][: area.length] == before


@pytest.mark.parametrize("options", [{"cluster_size": 512}, {"cluster_size": 16384}], ids=str)
def test_power_cut_at_any_point_keeps_what_was_flushed(
    encrypted: Images, seed: int, options: dict[str, Any]
) -> None:
    rng = random.Random(seed)
    create_luks(encrypted, "image", DISK_BYTES, **options)
    recorder = run_workload(encrypted, rng, **UNLOCK)
    cut_disk = CutDisk(recorder.content, recorder.operations, recorder.flush_starts)
    history = GuestHistory(DISK_BYTES // SECTOR)
    events = list(recorder.events)
    for cut in sorted(rng.randrange(len(recorder.operations) + 1) for _ in range(CUTS)):
        while events and events[0].at <= cut:
            history.play(events.pop(0))
        content = cut_disk.after_cut(cut, rng)
        judged = Checker(content)
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        encrypted.files.add("cut", bytes(content))
        disk = encrypted.open("cut", read_only=True, **UNLOCK)
        found = disk.read(0, DISK_BYTES)
        disk.close()
        for sector, values in enumerate(history.values):
            possible = {value for _, value in values}
            assert found[sector * SECTOR :][:SECTOR] in possible, (sector, cut)


def test_power_cut_during_creation_leaves_an_image_or_none(encrypted: Images, seed: int) -> None:
    rng = random.Random(seed)
    image = create_luks(encrypted, "image", 64 * KIB, cluster_size=4096)
    made = bytes(image.content)
    log = list(image.log)
    ends = [index for index, found in enumerate(log) if found.kind == "flush"]
    cut_disk = CutDisk(b"", log, ends)
    for cut in range(len(log) + 1):
        content = bytes(cut_disk.after_cut(cut, rng))
        if content[:4] != made[:4]:
            continue
        encrypted.files.add("cut", content)
        disk = encrypted.open("cut", read_only=True, **UNLOCK)
        assert disk.read(0, 64 * KIB) == bytes(64 * KIB)
        disk.close()
