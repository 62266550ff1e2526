# SPDX-License-Identifier: Apache-2.0
"""Headers: what is kept, what is refused, and in which words."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.driver import Qcow2Driver
from blockemu.drivers.qcow2.features import feature_names, name_table
from blockemu.drivers.qcow2.header import Extension, Header, check_tables, check_writable, parse
from blockemu.drivers.qcow2.probe import names_other_file


def header(**fields: Any) -> Header:
    """A small valid header: 64 KiB clusters, one L1 entry."""
    found = Header(
        version=3, cluster_bits=16, size=1 << 20, l1_size=1, l1_table_offset=3 << 16,
        refcount_table_offset=1 << 16, refcount_table_clusters=1,
    )  # fmt: skip
    return replace(found, **fields)


def bytes_of(found: Header) -> bytes:
    return found.serialise("image").ljust(1 << 16, b"\0")


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        parse("image", data)
    assert caught.value.name == "image"
    return caught.value.reason


def test_serialise_then_parse_is_the_same_header() -> None:
    given = header(
        backing_file="base.img",
        extensions=[Extension(0xE2792ACA, b"raw"), Extension(0x12345678, b"unknown thing")],
        compatible_features=1 << 40,
        autoclear_features=1 << 3,
        refcount_order=6,
    )
    assert parse("image", bytes_of(given)) == given


def test_version_2_has_no_fields_behind_72() -> None:
    given = header(version=2, header_length=72, additional=b"", backing_file="x")
    found = parse("image", bytes_of(given))
    assert found == given
    assert (found.header_length, found.refcount_order) == (72, 4)


def test_additional_fields_that_nobody_knows_are_kept() -> None:
    given = header(additional=bytes(8) + b"whatever", header_length=120)
    assert parse("image", bytes_of(given)).additional == bytes(8) + b"whatever"


def test_backing_format_is_the_extension_text() -> None:
    assert header(extensions=[Extension(0xE2792ACA, b"qcow2")]).backing_format == "qcow2"
    assert header().backing_format is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 4}, "version 4"),
        ({"cluster_bits": 8}, "cluster_bits is 8"),
        ({"cluster_bits": 22}, "cluster_bits is 22"),
        ({"refcount_order": 7}, "refcount_order is 7"),
        ({"crypt_method": 3}, "encrypted (method 3)"),
        ({"crypt_method": 2}, "where its LUKS header is"),
        ({"size": 2**63}, "virtual size"),
        ({"l1_size": 2**31}, "32 MiB is the limit"),
        ({"l1_size": 1, "size": 1 << 40}, "too few"),
        ({"refcount_table_clusters": 0}, "no refcount table"),
        ({"refcount_table_clusters": 1 << 20}, "8 MiB is the limit"),
        ({"nb_snapshots": 2**31}, "65536 is the limit"),
        ({"incompatible_features": 1 << 5}, "unsupported incompatible feature(s): bit 5"),
        ({"incompatible_features": 1 << 63 | 1 << 4 | 1 << 2}, "feature(s): bit 63"),
        ({"incompatible_features": 1 << 4, "cluster_bits": 13}, "clusters of 8192 bytes"),
        ({"incompatible_features": 1 << 63}, "bit 63"),
    ],
)
def test_impossible_header_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    given = header(**fields)
    version = given.version
    given.version = 3
    data = (
        bytearray(given.serialise("image").ljust(1 << 16, b"\0"))
        if (given.cluster_bits >= 9)
        else bytearray(bytes_of(header()))
    )
    struct.pack_into(">I", data, 4, version)
    struct.pack_into(">I", data, 20, given.cluster_bits)
    assert words in reason(bytes(data))


def test_unknown_feature_is_named_from_the_image_own_table() -> None:
    entry = bytes((0, 17)) + b"time travel".ljust(46, b"\0")
    given = header(incompatible_features=1 << 17, extensions=[Extension(0x6803F857, entry)])
    assert "time travel" in reason(bytes_of(given))


def test_feature_names_that_could_garble_a_terminal_are_not_repeated() -> None:
    table = bytes((0, 17)) + b"\x1b[2J".ljust(46, b"\0")
    assert feature_names(1 << 17, table) == ["bit 17"]


def test_our_own_table_names_what_we_know() -> None:
    assert len(name_table()) % 48 == 0
    assert feature_names(0b11111, b"") == [
        "dirty bit", "corrupt bit", "external data file", "compression type", "extended L2 entries",
    ]  # fmt: skip


@pytest.mark.parametrize("length", [0, 4, 71])
def test_too_short_a_file_is_no_image(length: int) -> None:
    assert "not a qcow2 image" in reason(bytes_of(header())[:length])


@pytest.mark.parametrize("length", [0, 96, 108, 1 << 20])
def test_impossible_header_length_is_refused(length: int) -> None:
    data = bytearray(bytes_of(header()))
    struct.pack_into(">I", data, 100, length)
    assert "header_length" in reason(bytes(data))


def test_extension_past_the_header_is_refused() -> None:
    data = bytearray(bytes_of(header()))
    struct.pack_into(">II", data, 112, 0x12345678, 0x7FFFFFFF)
    assert "0x12345678 reaches past" in reason(bytes(data))


@pytest.mark.parametrize(
    ("offset", "length", "words"),
    [(200, 1024, "1023 are allowed"), ((1 << 16) - 3, 8, "first cluster"), (2**63, 8, "first")],
)
def test_impossible_backing_name_is_refused(offset: int, length: int, words: str) -> None:
    data = bytearray(bytes_of(header()))
    struct.pack_into(">QI", data, 8, offset, length)
    assert words in reason(bytes(data))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"l1_table_offset": 12345}, "L1 table at offset 12345 is not aligned"),
        ({"refcount_table_offset": 1 << 40}, "(65536 bytes at offset 1099511627776)"),
        ({"l1_table_offset": 0}, "L1 table at offset 0 lies over the header"),
        ({"l1_table_offset": 1 << 16}, "L1 table at offset 65536 lies over the refcount table"),
        ({"nb_snapshots": 3, "snapshots_offset": 3 << 16}, "lies over the L1 table"),
        ({"nb_snapshots": 60000, "snapshots_offset": 4 << 16}, "past the end of the file"),
    ],
)
def test_tables_that_the_file_cannot_hold_are_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ImageError) as caught:
        check_tables("image", header(**fields), file_bytes=5 << 16)
    assert words in caught.value.reason


def test_corrupt_image_is_not_written() -> None:
    with pytest.raises(ImageError) as caught:
        check_writable("image", header(incompatible_features=1 << 1))
    assert "marked corrupt" in caught.value.reason
    assert "blockemu img check -r all image" in caught.value.reason


def test_header_that_outgrows_its_cluster_is_refused() -> None:
    with pytest.raises(ImageError, match="don't fit"):
        header(cluster_bits=9, backing_file="b" * 1000).serialise("image")


def test_probe_tells_of_other_files() -> None:
    assert names_other_file(bytes_of(header())) is None
    assert names_other_file(bytes_of(header(backing_file="/etc/shadow"))) == "/etc/shadow"
    assert names_other_file(bytes_of(header(incompatible_features=4))) == "(an external data file)"
    far = bytearray(bytes_of(header()))
    struct.pack_into(">QI", far, 8, 60000, 5)
    assert names_other_file(bytes(far)[:4096]) == "(a backing file)"


def test_versions_to_come_are_recognised_and_version_1_is_not() -> None:
    for version, known in ((1, False), (2, True), (3, True), (4, True)):
        start = b"QFI\xfb" + version.to_bytes(4, "big")
        assert Qcow2Driver.recognises(start) is known
    assert not Qcow2Driver.recognises(b"QFI\xfb")
    assert not Qcow2Driver.recognises(b"")
