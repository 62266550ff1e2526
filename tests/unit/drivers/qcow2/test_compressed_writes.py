# SPDX-License-Identifier: Apache-2.0
"""Writes with WRITE_COMPRESSED: what is stored how, where it lies, and what QEMU thinks of it."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2 import compression
from blockemu.drivers.qcow2.cluster_map import Kind
from blockemu.drivers.qcow2.compression import DEFLATE, ZSTD, compressor, decompressor
from blockemu.drivers.qcow2.guest_compress import JOB_BYTES, JOBS_AT_ONCE
from blockemu.drivers.qcow2.layout import COMPRESSED, Layout
from blockemu.loop.aio_context import AioContext
from blockemu.loop.sync import gather
from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

COMPRESS = RequestFlags.WRITE_COMPRESSED
CLUSTER = 4 * KIB


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    """A real one: the thread pool compresses."""
    context = AioContext("test")
    context.adopt()
    yield context
    context.close()


def text(length: int, seed: int = 0) -> bytes:
    """Compresses to about a quarter."""
    rng = random.Random(seed)
    words = [rng.randbytes(6) for _ in range(40)]
    return b"".join(rng.choice(words) for _ in range(length // 6 + 1))[:length]


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def kinds(disk: Disk, first: int, count: int) -> list[Kind]:
    resolve, size = disk.driver.image.clusters.resolve, disk.driver.cluster_size
    return [disk.ctx.run(resolve(index * size, 1)).kind for index in range(first, first + count)]


def places(disk: Disk, first: int, count: int) -> list[tuple[int, int]]:
    """Host offset and length, to the sector's end, of compressed clusters."""
    image, size = disk.driver.image, disk.driver.cluster_size
    found = []
    for index in range(first, first + count):
        extent = disk.ctx.run(image.clusters.resolve(index * size, 1))
        assert extent.kind is Kind.COMPRESSED
        found.append(image.layout.compressed_extent(extent.host))
    return found


def refcount(disk: Disk, cluster: int) -> int:
    return disk.ctx.run(disk.driver.image.refcounts.get(cluster))


def made(images: Images, size: int = MIB, **options: Any) -> Disk:
    images.create("image", size, **{"cluster_size": CLUSTER, **options})
    return images.open("image")


def finish(disk: Disk, content: bytes | bytearray, tmp_path: Path) -> None:
    """Close; what we read after opening again, and what QEMU reads, is `content`; no leaks."""
    disk.close()
    again = disk.images.open(disk.path, read_only=True)
    assert again.read(0, len(content)) == content
    again.close()
    disk.images.check(disk.path, tmp_path)
    disk.images.compare(disk.path, content, tmp_path)


# --- round trips ---


@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512 << shift for shift in range(13)])
def test_what_is_written_compressed_is_read_back_by_us_and_qemu(
    images: Images, cluster_size: int, compression_type: str, tmp_path: Path
) -> None:
    size = 5 * cluster_size
    disk = made(images, size, cluster_size=cluster_size, compression_type=compression_type)
    content = text(size)
    disk.write_compressed(0, content)
    if cluster_size > 512:
        assert set(kinds(disk, 0, 5)) == {Kind.COMPRESSED}
    assert disk.read(0, size) == content
    finish(disk, content, tmp_path)


def test_qemu_converts_what_was_written_compressed(images: Images, tmp_path: Path) -> None:
    disk = made(images, 2 * MIB, cluster_size=64 * KIB)
    content = text(MIB) + bytes(512 * KIB) + noise(512 * KIB)
    disk.write_compressed(0, content)
    finish(disk, content, tmp_path)
    raw = tmp_path / "converted.raw"
    QemuImg.convert(tmp_path / "image", raw, source_fmt="qcow2", target_fmt="raw")
    assert raw.read_bytes() == content
    used = len(images["image"].content)
    assert used < 512 * KIB + MIB // 3 + 6 * 64 * KIB, f"{used} bytes: nothing was saved"


@pytest.mark.parametrize("kind", [DEFLATE, ZSTD])
def test_compressor_and_decompressor_agree(kind: int) -> None:
    data = text(64 * KIB)
    packed = compressor("disk", kind)(memoryview(data))
    assert len(packed) < len(data) // 2
    assert decompressor("disk", kind)(packed + b"and more", len(data)) == data


def test_zstd_without_a_library_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(compression, "import_module", fail)
    with pytest.raises(ImageError, match="install the Python package 'zstandard'"):
        compressor("disk", ZSTD)


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_descriptor_says_where_and_how_many_sectors(cluster_bits: int) -> None:
    layout = Layout(cluster_bits, 4, 3)
    size = 1 << cluster_bits
    for host, length in ((size, 1), (size + 511, 1), (size + 511, 2), (3 * size - 7, size - 1)):
        word = layout.compressed_descriptor(host, length)
        assert word & COMPRESSED
        found, upto = layout.compressed_extent(word)
        assert found == host
        assert (host + upto) % 512 == 0
        assert length <= upto < length + 512
    top = layout.compressed_end_max - size
    assert layout.compressed_extent(layout.compressed_descriptor(top, 1))[0] == top


# --- what is stored how ---


def test_incompressible_cluster_is_stored_plain(images: Images, tmp_path: Path) -> None:
    disk = made(images)
    content = noise(CLUSTER) + text(CLUSTER) + noise(2 * CLUSTER, 1)
    disk.write_compressed(0, content)
    assert kinds(disk, 0, 4) == [Kind.DATA, Kind.COMPRESSED, Kind.DATA, Kind.DATA]
    finish(disk, content + bytes(MIB - len(content)), tmp_path)


@pytest.mark.parametrize("backing", [False, True])
def test_zero_cluster_takes_no_space(images: Images, backing: bool, tmp_path: Path) -> None:
    base = b"\xbb" * MIB if backing else bytes(MIB)
    (tmp_path / "base").write_bytes(base)
    images.files.add("base", base)
    options = {"backing_file": "base", "backing_fmt": "raw"} if backing else {}
    disk = made(images, **options)
    disk.write(2 * CLUSTER, b"x" * CLUSTER)
    disk.write_compressed(0, bytes(3 * CLUSTER))
    assert kinds(disk, 0, 2) == [Kind.ZERO if backing else Kind.UNALLOCATED] * 2
    assert kinds(disk, 2, 1) == [Kind.ZERO]
    finish(disk, bytes(3 * CLUSTER) + base[3 * CLUSTER :], tmp_path)


def test_zeroes_over_a_backing_file_are_compressed_in_version_2(
    images: Images, tmp_path: Path
) -> None:
    base = b"\xbb" * MIB
    (tmp_path / "base").write_bytes(base)
    images.files.add("base", base)
    disk = made(images, compat="0.10", backing_file="base", backing_fmt="raw")
    disk.write_compressed(CLUSTER, bytes(2 * CLUSTER))
    assert kinds(disk, 1, 2) == [Kind.COMPRESSED] * 2
    finish(disk, base[:CLUSTER] + bytes(2 * CLUSTER) + base[3 * CLUSTER :], tmp_path)


@pytest.mark.parametrize("tail", [512, 1024, CLUSTER - 512])
def test_short_last_cluster_is_padded_with_zeroes(
    images: Images, tail: int, tmp_path: Path
) -> None:
    size = 3 * CLUSTER + tail
    disk = made(images, size)
    disk.write_compressed(0, noise(size))
    content = text(size)
    disk.write_compressed(0, content[: 2 * CLUSTER])
    disk.write_compressed(2 * CLUSTER, content[2 * CLUSTER :])
    assert kinds(disk, 0, 4) == [Kind.COMPRESSED] * 4
    finish(disk, content, tmp_path)


def test_short_last_cluster_of_noise_and_of_zeroes(images: Images, tmp_path: Path) -> None:
    size = CLUSTER + CLUSTER // 2
    disk = made(images, size, cluster_size=512)
    content = noise(size)
    disk.write_compressed(0, content)
    assert disk.read(0, size) == content
    disk.write_compressed(0, bytes(size))
    finish(disk, bytes(size), tmp_path)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(1, CLUSTER), (512, CLUSTER), (0, CLUSTER - 512), (0, CLUSTER + 1), (CLUSTER, 512)],
)
def test_parts_of_clusters_are_refused(images: Images, offset: int, length: int) -> None:
    disk = made(images)
    with pytest.raises(OSError, match="aren't whole clusters") as caught:
        disk.write_compressed(offset, text(length))
    assert caught.value.errno == errno.EINVAL
    assert disk.read(0, 3 * CLUSTER) == bytes(3 * CLUSTER)
    disk.close()


def test_empty_write_does_nothing(images: Images, tmp_path: Path) -> None:
    disk = made(images)
    disk.write_compressed(0, b"")
    finish(disk, bytes(MIB), tmp_path)


def test_fua_makes_a_compressed_write_durable(images: Images) -> None:
    disk = made(images)
    content = text(CLUSTER)
    flags = COMPRESS | RequestFlags.FUA
    disk.ctx.run(disk.node.pwritev(0, memoryview(content), flags))
    disk.abandon()
    again = images.open("image", read_only=True)
    assert again.read(0, CLUSTER) == content
    again.close()


def test_out_of_reach_of_descriptors_clusters_are_plain(images: Images) -> None:
    disk = made(images, cluster_size=2 * MIB, size=2 * MIB)
    image = disk.driver.image
    image.refcounts.used_end = image.layout.compressed_end_max >> image.layout.cluster_bits
    disk.write_compressed(0, text(2 * MIB))
    assert kinds(disk, 0, 1) == [Kind.DATA]
    image.refcounts.used_end = 100
    disk.close()


# --- where it lies ---


def test_clusters_share_a_host_cluster_which_counts_each(images: Images, tmp_path: Path) -> None:
    disk = made(images, cluster_size=64 * KIB, size=4 * MIB)
    content = b"".join(text(KIB, seed) * 64 for seed in range(6))
    for start in range(0, len(content), 64 * KIB):
        disk.write_compressed(start, content[start : start + 64 * KIB])
    found = places(disk, 0, 6)
    host = found[0][0] >> 16
    assert all(offset >> 16 == (offset + length - 1) >> 16 == host for offset, length in found)
    assert refcount(disk, host) == 6
    assert found[1][0] % 512, "not at the granularity of bytes"
    finish(disk, content + bytes(4 * MIB - len(content)), tmp_path)


def test_cluster_that_doesnt_fit_runs_on_into_the_next_host_cluster(
    images: Images, tmp_path: Path
) -> None:
    disk = made(images)
    content = b"".join(noise(2500, seed).ljust(CLUSTER, b"-") for seed in range(8))
    disk.write_compressed(0, content)
    found = places(disk, 0, 8)
    assert any(offset // CLUSTER != (offset + length - 1) // CLUSTER for offset, length in found)
    assert max(offset + length for offset, length in found) - found[0][0] < 6 * CLUSTER
    finish(disk, content + bytes(MIB - len(content)), tmp_path)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4])
def test_count_at_its_limit_begins_a_new_host_cluster(
    images: Images, refcount_bits: int, tmp_path: Path
) -> None:
    disk = made(images, refcount_bits=refcount_bits)
    content = b"".join(bytes((fill,)) * CLUSTER for fill in range(1, 41))
    disk.write_compressed(0, content)
    per_host: dict[int, int] = {}
    for offset, _ in places(disk, 0, 40):
        per_host[offset // CLUSTER] = per_host.get(offset // CLUSTER, 0) + 1
    assert max(per_host.values()) == min((1 << refcount_bits) - 1, 40)
    finish(disk, content + bytes(MIB - len(content)), tmp_path)


def test_host_cluster_that_became_free_is_filled_no_further(images: Images, tmp_path: Path) -> None:
    """Its place may be anything by then: here a plain cluster, which must stay as it is."""
    disk = made(images)
    disk.write_compressed(0, b"a" * CLUSTER)
    host = places(disk, 0, 1)[0][0] // CLUSTER
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    disk.flush()
    assert refcount(disk, host) == 0
    plain = noise(8 * CLUSTER)
    disk.write(CLUSTER, plain)
    assert refcount(disk, host) == 1
    disk.write_compressed(0, b"b" * CLUSTER)
    finish(disk, b"b" * CLUSTER + plain + bytes(MIB - 9 * CLUSTER), tmp_path)


def test_place_that_is_used_again_is_unpacked_again(images: Images, tmp_path: Path) -> None:
    """The reader keeps the last cluster that it unpacked, by its place."""
    disk = made(images)
    disk.write_compressed(0, b"a" * CLUSTER)
    assert disk.read(0, CLUSTER) == b"a" * CLUSTER
    before = places(disk, 0, 1)
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    disk.flush()
    disk.write_compressed(0, b"b" * CLUSTER)
    assert places(disk, 0, 1) == before
    assert disk.read(0, CLUSTER) == b"b" * CLUSTER
    finish(disk, b"b" * CLUSTER + bytes(MIB - CLUSTER), tmp_path)


# --- over what was there ---


def test_compressed_over_plain_over_compressed_leaks_nothing(
    images: Images, tmp_path: Path
) -> None:
    disk = made(images)
    model = bytearray(MIB)
    for turn in range(3):
        content = text(20 * CLUSTER, turn)
        disk.write_compressed(0, content)
        model[: len(content)] = content
        disk.write(5 * CLUSTER + 100, b"p" * (3 * CLUSTER))
        model[5 * CLUSTER + 100 : 8 * CLUSTER + 100] = b"p" * (3 * CLUSTER)
        disk.flush()
        assert disk.read(0, MIB) == model
    assert kinds(disk, 4, 6) == [Kind.COMPRESSED] + [Kind.DATA] * 4 + [Kind.COMPRESSED]
    finish(disk, model, tmp_path)


@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
def test_image_of_qemu_img_convert_is_overwritten(
    images: Images, compression_type: str, tmp_path: Path
) -> None:
    raw, packed = tmp_path / "source.raw", tmp_path / "packed.qcow2"
    model = bytearray(text(2 * MIB))
    raw.write_bytes(model)
    run_tool(
        ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
         "-o", f"compression_type={compression_type}", raw, packed]
    )  # fmt: skip
    images.load("image", packed)
    disk = images.open("image")
    size = disk.driver.cluster_size
    assert kinds(disk, 0, 1) == [Kind.COMPRESSED]
    content = text(7 * size, 1)
    disk.write_compressed(3 * size, content)
    disk.write_compressed(size, noise(size))
    disk.write(12 * size + 5, b"plain")
    model[3 * size : 10 * size] = content
    model[size : 2 * size] = noise(size)
    model[12 * size + 5 : 12 * size + 10] = b"plain"
    finish(disk, model, tmp_path)


def test_snapshot_keeps_what_is_overwritten(images: Images, tmp_path: Path) -> None:
    disk = made(images)
    old = text(10 * CLUSTER)
    disk.write_compressed(0, old)
    disk.close()
    path = images.save("image", tmp_path)
    run_tool(["qemu-img", "snapshot", "-c", "s", path])
    images.load("image", path)
    disk = images.open("image")
    new = text(10 * CLUSTER, 1)
    disk.write_compressed(0, new)
    finish(disk, new + bytes(MIB - len(new)), tmp_path)
    run_tool(["qemu-img", "snapshot", "-a", "s", path])
    (tmp_path / "old.raw").write_bytes(old + bytes(MIB - len(old)))
    QemuImg.compare(path, tmp_path / "old.raw", one_fmt="qcow2")


def test_map_doesnt_point_at_what_was_replaced(images: Images) -> None:
    disk = made(images)
    disk.write(0, b"p" * (4 * CLUSTER))
    direct_map = disk.driver.direct_map()
    assert direct_map is not None
    disk.read(0, 4 * CLUSTER)
    assert direct_map.lookup_read(0, CLUSTER) >= 0
    disk.write_compressed(0, text(2 * CLUSTER))
    assert direct_map.lookup_read(0, CLUSTER) == -1
    assert direct_map.lookup_read(CLUSTER, CLUSTER) == -1
    assert direct_map.lookup_read(2 * CLUSTER, CLUSTER) >= 0
    disk.close()


# --- many at once ---


def test_request_of_many_clusters_is_compressed_some_at_a_time(
    images: Images, tmp_path: Path
) -> None:
    disk = made(images, cluster_size=64 * KIB, size=4 * MIB)
    compressor_of_image = disk.driver.image.compressor
    running = most = 0
    offload = compressor_of_image.offload

    async def counted(job: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await offload(job)
        finally:
            running -= 1

    compressor_of_image.offload = counted
    content = text(4 * MIB)
    disk.write_compressed(0, content)
    assert 4 * MIB > JOBS_AT_ONCE * JOB_BYTES
    assert most == JOBS_AT_ONCE
    finish(disk, content, tmp_path)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("direct", [False, True])
def test_compressed_and_plain_writes_at_once_all_hold(
    images: Images, cluster_size: int, direct: bool, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    images.create("image", 2 * MIB, cluster_size=cluster_size)
    images["image"].latency_ns = lambda kind, offset, length: rng.randrange(1, 100_000)
    disk = images.open("image", direct=direct)
    lane = 2 * MIB // 16
    model = bytearray(2 * MIB)

    async def work(number: int) -> None:
        for step in range(6):
            start = number * lane + rng.randrange(lane) // cluster_size * cluster_size
            length = rng.randrange(1, (number + 1) * lane - start + 1)
            if step % 3:
                length = -(-length // cluster_size) * cluster_size
                data = (text if rng.random() < 0.7 else noise)(length, rng.randrange(99))
                await disk.node.pwritev(start, memoryview(data), COMPRESS)
            else:
                data = noise(length, step)
                await disk.node.pwritev(start, memoryview(data))
            model[start : start + length] = data
            if rng.random() < 0.2:
                await disk.node.flush()
            found = bytearray(length)
            await disk.node.preadv(start, memoryview(found))
            assert found == data

    disk.ctx.run(gather(*(work(number) for number in range(16))))
    images["image"].latency_ns = None
    finish(disk, model, tmp_path)


def test_failed_write_leaves_the_old_contents_and_no_leak(images: Images, tmp_path: Path) -> None:
    disk = made(images)
    old = text(MIB)
    disk.write_compressed(0, old)
    images["image"].fault = lambda kind, offset, length: errno.EIO if kind == "write" else 0
    with pytest.raises(OSError) as caught:
        disk.write_compressed(4 * CLUSTER, text(8 * CLUSTER, 1))
    assert caught.value.errno == errno.EIO
    images["image"].fault = None
    assert disk.read(0, MIB) == old
    disk.write_compressed(MIB - CLUSTER, old[-CLUSTER:])
    finish(disk, old, tmp_path)


def test_full_host_leaves_what_was_written_and_no_leak(images: Images, tmp_path: Path) -> None:
    disk = made(images, 64 * MIB, cluster_size=64 * KIB)
    disk.write_compressed(0, text(MIB))
    images["image"].fault = lambda kind, offset, length: errno.ENOSPC if kind == "truncate" else 0
    with pytest.raises(OSError) as caught:
        disk.write_compressed(MIB, text(MIB, 1) * 63)
    assert caught.value.errno == errno.ENOSPC
    images["image"].fault = None
    found = disk.read(0, 64 * MIB)
    assert found[:MIB] == text(MIB)
    finish(disk, found, tmp_path)
