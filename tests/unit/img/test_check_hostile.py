# SPDX-License-Identifier: Apache-2.0
"""Images made to make a check run for ever, or take all memory: sparse files with huge claims."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.repair import Repair
from blockemu.img.check import CheckReport, read_check

CLUSTER = 65536
MEMORY_MAX = 256 * 1024 * 1024


def write_image(
    path: Path,
    *,
    file_bytes: int = 1 << 40,
    size: int = 1 << 30,
    cluster_bits: int = 16,
    l1: tuple[int, int] = (3 * CLUSTER, 2),
    reftable: tuple[int, int] = (CLUSTER, 1),
    snapshots: tuple[int, int] = (0, 0),
    words: dict[int, bytes] | None = None,
) -> None:
    """A sparse file with a version 3 header and `words` at their offsets."""
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, cluster_bits, size, 0, l1[1], l1[0],
        reftable[0], reftable[1], snapshots[1], snapshots[0], 0, 0, 0, 4, 104,
    )  # fmt: skip
    with path.open("wb") as file:
        file.truncate(file_bytes)
        file.write(header)
        for offset, data in (words or {}).items():
            file.seek(offset)
            file.write(data)


def check(path: Path) -> CheckReport | ImageError:
    try:
        return read_check(str(path), fmt="qcow2")
    except ImageError as error:
        return error


def repeated(values: list[int], times: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values) * times


def test_l1_table_that_names_one_table_a_million_times_is_walked_once(tmp_path: Path) -> None:
    path = tmp_path / "image"
    entries = 1 << 20
    table = 1 << 30
    write_image(
        path,
        l1=(1 << 24, entries),
        words={
            1 << 24: repeated([table], entries),
            table: repeated([table + CLUSTER], CLUSTER // 8),
        },
    )
    report = check(path)
    assert isinstance(report, CheckReport)
    assert report.result.allocated_clusters == entries * CLUSTER // 8


def test_entries_spread_over_a_huge_hole_end_in_one_line(tmp_path: Path) -> None:
    """Each names a cluster 256 MiB further on, and so takes a page of counts for itself."""
    path = tmp_path / "image"
    tables = [(1 << 25) + (index << 12) for index in range(8)]
    spread = [index << 28 | 1 << 20 for index in range(4096)]
    write_image(
        path, file_bytes=1 << 43, cluster_bits=12, l1=(1 << 24, 512),
        words={1 << 24: struct.pack(">8Q", *tables), tables[0]: struct.pack(">4096Q", *spread)},
    )  # fmt: skip
    tracemalloc.start()
    try:
        found = check(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "192 MiB of memory" in str(found)
    assert peak < MEMORY_MAX


def test_l1_table_of_garbage_is_counted_soon(tmp_path: Path) -> None:
    """Where in its chunk each bad entry stood was looked for, even when nobody was to be told."""
    path = tmp_path / "image"
    entries = 1 << 17
    words = struct.pack(f">{entries}Q", *((1 << 41) + (index << 16) for index in range(entries)))
    write_image(path, l1=(1 << 24, entries), words={1 << 24: words})
    report = check(path)
    assert isinstance(report, CheckReport)
    assert report.result.corruptions > entries


@pytest.mark.parametrize("snapshots", [65536, 2**31, 2**32 - 1])
def test_snapshots_beyond_all_reason_end_soon(tmp_path: Path, snapshots: int) -> None:
    path = tmp_path / "image"
    entry = struct.pack(">QIHHIIQII", 1 << 25, 1 << 22, 0, 0, 0, 0, 0, 0, 0)
    write_image(
        path, snapshots=(1 << 30, snapshots), words={1 << 30: entry * 1000, 1 << 25: b"\x80" * 4096}
    )
    found = check(path)
    if snapshots > 65536:
        assert "65536 is the limit" in str(found)
    else:
        assert isinstance(found, CheckReport)
        assert found.status == 2


def test_l1_tables_that_each_begin_a_cluster_later_are_not_all_followed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    entries = b"".join(
        struct.pack(">QIHHIIQII", (1 << 25) + number * CLUSTER, 1 << 22, 0, 0, 0, 0, 0, 0, 0)
        for number in range(5000)
    )
    write_image(path, file_bytes=1 << 31, snapshots=(1 << 30, 5000), words={1 << 30: entries})
    found = check(path)
    assert isinstance(found, CheckReport)
    assert found.status == 2


def test_refcount_table_full_of_one_block_ends_soon(tmp_path: Path) -> None:
    path = tmp_path / "image"
    entries = 1 << 20
    write_image(
        path,
        file_bytes=1 << 40,
        reftable=(1 << 24, 128),
        words={1 << 24: repeated([1 << 28], entries), 1 << 28: b"\x00\x01\x00\x00" * 16384},
    )
    found = check(path)
    assert isinstance(found, CheckReport)
    assert found.result.leaks > 1000
    assert found.status == 2


def test_size_near_the_end_of_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, size=2**64 - 1)
    assert "not possible" in str(check(path))
    write_image(path, size=2**63 - 1)
    assert "too few" in str(check(path))


def test_refcounts_of_a_file_too_long_for_a_table_are_not_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, file_bytes=1 << 43, cluster_bits=9, l1=(1 << 12, 2), size=65536)
    with path.open("rb") as file:
        before = file.read(1 << 14)
    with pytest.raises(ImageError, match="over 8 MiB; the file is too long"):
        read_check(str(path), fmt="qcow2", repair=Repair.ALL)
    with path.open("rb") as file:
        assert file.read(1 << 14) == before
