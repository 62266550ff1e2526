# SPDX-License-Identifier: Apache-2.0
"""Images that lie: refused with a line, or an EIO for the request that meets the lie."""

from __future__ import annotations

import errno
import logging
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from blockemu.drivers.errors import ImageError
from tests.unit.drivers.qcow2.support import MIB, Images

CLUSTER = 65536


def refusal(images: Images, *, read_only: bool = True) -> str:
    with pytest.raises(ImageError) as caught:
        images.open("image", read_only=read_only)
    assert "\n" not in str(caught.value)
    assert caught.value.name == "image"
    return caught.value.reason


def u64(image: bytearray, offset: int) -> int:
    return int(struct.unpack_from(">Q", image, offset)[0])


def put(image: bytearray, offset: int, value: int) -> None:
    struct.pack_into(">Q", image, offset, value)


def marked_corrupt(image: bytes) -> bytes:
    """The image with bit 1 of its incompatible features set."""
    return image[:79] + bytes((image[79] | 2,)) + image[80:]


def test_empty_file_is_refused(images: Images) -> None:
    images.files.add("image")
    assert "not a qcow2 image" in refusal(images)


def test_other_content_is_refused(images: Images) -> None:
    images.files.add("image", b"hello" * 1000)
    assert "no qcow2 header" in refusal(images)


def test_truncated_image_is_refused_and_named(images: Images) -> None:
    image = images.create("image", 16 * MIB)
    del image.content[3 * CLUSTER :]
    assert "the L1 table (8 bytes at offset 196608) reaches past the end" in refusal(images)
    del image.content[CLUSTER:]
    assert "the refcount table" in refusal(images)
    del image.content[100:]
    assert "ends inside" in refusal(images)


def test_huge_claims_are_refused_before_memory_is_taken(images: Images) -> None:
    image = images.create("image", MIB)
    struct.pack_into(">I", image.content, 36, 4 * MIB)
    assert "reaches past the end of the file" in refusal(images)
    struct.pack_into(">I", image.content, 36, 2**32 - 1)
    assert "32 MiB is the limit" in refusal(images)


def test_backing_file_without_a_format_is_refused_with_advice(images: Images) -> None:
    images.files.add("base", bytes(MIB))
    image = images.create("image", MIB, backing_file="base", backing_fmt="raw")
    header = bytes(image.content[:CLUSTER])
    image.content[:CLUSTER] = header.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78")
    assert "blockemu img rebase -u -b base -F FORMAT image" in refusal(images)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("json:{}", "backing file 'json:{}': option 'file' is missing"),
        ("json:{", "Could not parse the JSON options"),
        ('json:{"file":{"driver":"nope"}}', "there is no driver 'nope'"),
        ("nbds://host/?tls=1", "means nothing in a URI of NBD over TCP"),
        ("ssh:x", "Unknown protocol 'ssh'"),
    ],
)
def test_backing_name_that_leads_nowhere_is_refused(images: Images, name: str, reason: str) -> None:
    images.create("image", MIB, backing_file=name, backing_fmt="raw")
    assert reason in refusal(images)


def test_cycle_of_backing_files_is_refused(images: Images) -> None:
    images.create("image", MIB, backing_file="other", backing_fmt="qcow2")
    images.create("other", MIB, backing_file="image", backing_fmt="qcow2")
    with pytest.raises(ImageError, match="leads back to itself"):
        images.open("image", read_only=True)


def test_missing_backing_file_is_refused_by_name(images: Images) -> None:
    images.create("image", MIB, backing_file="gone", backing_fmt="raw")
    with pytest.raises(ImageError, match=r"gone: .*No such file"):
        images.open("image", read_only=True)


def test_corrupt_image_is_read_but_not_written(images: Images) -> None:
    image = images.create("image", MIB)
    put(image.content, 72, 2)
    assert "blockemu img check -r all" in refusal(images, read_only=False)
    assert images.open("image", read_only=True).read(0, 512) == bytes(512)


def damage_l1(image: bytearray) -> None:
    put(image, u64(image, 40), 1 << 63 | 1 << 50)


def damage_l1_alignment(image: bytearray) -> None:
    l1 = u64(image, 40)
    put(image, l1, u64(image, l1) + 512)


def l2_table(image: bytearray) -> int:
    return u64(image, u64(image, 40)) & 0x00FFFFFFFFFFFE00


def damage_l2_outside(image: bytearray) -> None:
    put(image, l2_table(image), 1 << 63 | 1 << 50)


def damage_l2_alignment(image: bytearray) -> None:
    put(image, l2_table(image), u64(image, l2_table(image)) + 512)


def damage_l2_reserved(image: bytearray) -> None:
    put(image, l2_table(image), u64(image, l2_table(image)) | 1 << 57)


def damage_l2_compressed_outside(image: bytearray) -> None:
    put(image, l2_table(image), 1 << 62 | 1 << 45)


def damage_l2_compressed_garbage(image: bytearray) -> None:
    put(image, l2_table(image), 1 << 62 | 12345)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_l1, "L1 entry 0 at offset"),
        (damage_l1_alignment, "L1 entry 0 at offset"),
        (damage_l2_outside, "L2 entry at offset"),
        (damage_l2_alignment, "L2 entry at offset"),
        (damage_l2_reserved, "L2 entry at offset"),
        (damage_l2_compressed_outside, "compressed cluster at"),
        (damage_l2_compressed_garbage, "compressed cluster at"),
    ],
)
def test_damaged_entry_is_an_eio_and_one_line_in_the_log(
    images: Images,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytearray], None],
    words: str,
) -> None:
    image = images.create("image", 4 * MIB)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.write(CLUSTER * 3, b"y" * CLUSTER)
    disk.close()
    damage(image.content)
    disk = images.open("image")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                disk.read(100, 100)
            assert caught.value.errno == errno.EIO
            with pytest.raises(OSError) as caught:
                disk.write(100, b"z" * 100)
            assert caught.value.errno == errno.EIO
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("image: ")
    assert words in lines[0]


def test_damaged_refcount_table_is_an_eio_for_writes_that_allocate(
    images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    image = images.create("image", 4 * MIB)
    put(image.content, u64(image.content, 48), 1 << 50)
    disk = images.open("image")
    with caplog.at_level(logging.ERROR), pytest.raises(OSError) as caught:
        disk.write(0, b"x")
    assert caught.value.errno == errno.EIO
    assert "refcount table entry 0" in caplog.records[0].getMessage()
    assert disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize("what", ["header", "L1 table", "L2 table", "refcount table", "block"])
def test_table_counted_as_free_is_never_handed_out(
    images: Images, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Refcounts that are wrong made a write take the header's cluster, or a table's, for its data:
    the image was gone. QEMU refuses such a write, too."""
    image = images.create("image", 4 * MIB)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.close()
    reftable, l1 = u64(image.content, 48), u64(image.content, 40)
    block = u64(image.content, reftable)
    place = {
        "header": 0,
        "L1 table": l1,
        "L2 table": u64(image.content, l1) & ~(1 << 63),
        "refcount table": reftable,
        "block": block,
    }[what]
    struct.pack_into(">H", image.content, block + place // CLUSTER * 2, 0)
    before = bytes(image.content)
    disk = images.open("image")
    with caplog.at_level(logging.ERROR), pytest.raises(OSError) as caught:
        disk.write(CLUSTER, b"y" * CLUSTER)
    assert caught.value.errno == errno.EIO
    assert f"host cluster {place // CLUSTER} at offset" in caplog.text
    assert disk.read(0, 2 * CLUSTER) == b"x" * CLUSTER + bytes(CLUSTER)
    disk.close()
    assert image.content == marked_corrupt(before)


def test_missing_refcount_block_isnt_made_over_the_header(images: Images) -> None:
    image = images.create("image", 4 * MIB)
    put(image.content, u64(image.content, 48), 0)
    before = bytes(image.content)
    disk = images.open("image")
    with pytest.raises(OSError, match="host cluster 0 at offset"):
        disk.write(0, b"y" * CLUSTER)
    disk.close()
    assert image.content[:CLUSTER] == marked_corrupt(before)[:CLUSTER]


def test_compressed_cluster_that_claims_the_header_cant_free_it(images: Images) -> None:
    """Discarding the guest cluster counted the header's cluster down to 0 and punched it out."""
    image = images.create("image", 4 * MIB)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.close()
    put(image.content, u64(image.content, u64(image.content, 40)) & ~(1 << 63), 1 << 62 | 1024)
    before = bytes(image.content[:CLUSTER])
    disk = images.open("image")
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    disk.flush()
    with pytest.raises(OSError, match="marked corrupt"):
        disk.write(0, b"y" * 3 * CLUSTER)
    disk.close()
    assert image.content[:CLUSTER] == marked_corrupt(before)


def test_place_of_a_table_that_moved_is_used_again(images: Images, tmp_path: Path) -> None:
    images.create("image", 12 * MIB, cluster_size=512, refcount_bits=64)
    disk = images.open("image")
    disk.write(0, b"x" * 512)
    disk.ctx.run(disk.node.pdiscard(0, 512))
    disk.flush()
    disk.write(0, b"y" * 512)  # into the hole: the places of all tables are known from here on
    old = disk.driver.image.header.refcount_table_offset
    disk.write(512, b"x" * (12 * MIB - 512))
    assert disk.driver.image.header.refcount_table_offset != old
    disk.flush()
    assert disk.ctx.run(disk.driver.image.refcounts.get(old // 512))
    disk.close()
    images.check("image", tmp_path)


def test_random_damage_ends_in_errors_never_in_a_traceback(
    images: Images, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    original = images.create("image", MIB, cluster_size=512)
    disk = images.open("image")
    disk.write(0, rng.randbytes(300000))
    disk.close()
    content = bytes(original.content)
    caplog.set_level(logging.CRITICAL)
    for _ in range(150):
        image = images.files.add("image", content)
        for _ in range(rng.choice((1, 1, 4))):
            offset = rng.choice((rng.randrange(112), rng.randrange(8192), rng.randrange(20000)))
            image.content[offset] ^= 1 << rng.randrange(8)
        try:
            disk = images.open("image", read_only=bool(rng.randrange(2)))
        except ImageError:
            continue
        for _ in range(5):
            offset = rng.randrange(MIB - 5000)
            try:
                disk.read(offset, 5000)
                disk.write(offset, b"w" * 3000)
                disk.ctx.run(disk.node.pdiscard(offset, 5000))
                disk.flush()
            except OSError:
                pass
        disk.abandon()
