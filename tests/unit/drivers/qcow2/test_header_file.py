# SPDX-License-Identifier: Apache-2.0
"""Changes of the header in the file leave alone what they aren't about."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from blockemu.drivers.qcow2.header_file import HeaderFile
from blockemu.loop.memory_file import MemoryImage
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 4 * KIB
BASE = b"base"


def exotic(images: Images) -> MemoryImage:
    """A header with all that a later version may have put there: fields, extensions (one of them
    twice, one empty, one with padding that isn't zero), feature bits."""
    images.files.add("base", bytes(MIB))
    image = images.create(
        "image", MIB, cluster_size=CLUSTER, backing_file=BASE.decode(), backing_fmt="raw"
    )
    additional = bytes(8) + b"something new..."
    extensions = [
        (0xE2792ACA, b"raw", b"\xaa" * 5),
        (0x6E657721, b"what nobody knows", b"\x55" * 7),
        (0x23852875, bytes(24), b""),
        (0x6E657722, b"", b""),
        (0x6E657721, b"again", b"\x01\x02\x03"),
    ]
    tail = b"".join(
        struct.pack(">II", kind, len(data)) + data + padding for kind, data, padding in extensions
    )
    tail += struct.pack(">II", 0, 0)
    content = image.content
    length = 104 + len(additional)
    struct.pack_into(">I", content, 100, length)
    struct.pack_into(">Q", content, 80, 1 << 50)
    struct.pack_into(">Q", content, 88, 1 << 40 | 2)
    content[104:CLUSTER] = (additional + tail + BASE).ljust(CLUSTER - 104, b"\0")
    struct.pack_into(">QI", content, 8, length + len(additional + tail) - len(additional), 4)
    return image


def kept(content: bytes | bytearray) -> tuple[bytes, ...]:
    """What no change of a field may touch: everything but the fields up to 104."""
    return bytes(content[104:CLUSTER]), bytes(content[80:88]), bytes(content[8:24])


CHANGES: dict[str, Callable[[HeaderFile], Any]] = {
    "keep_autoclear": lambda header: header.keep_autoclear(0),
    "move_refcount_table": lambda header: header.move_refcount_table(offset=1 << 20, clusters=2),
    "move_l1": lambda header: header.move_l1(offset=1 << 21, entries=99),
    "set_size": lambda header: header.set_size(MIB // 2),
    "mark_corrupt": lambda header: header.mark_corrupt(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_change_keeps_unknown_fields_and_extensions_to_the_byte(
    images: Images, change: str
) -> None:
    image = exotic(images)
    before = bytes(image.content)
    disk = images.open("image")
    disk.ctx.run(CHANGES[change](disk.driver.image.header_file))
    assert bytes(image.content[:104]) != before[:104]
    assert kept(image.content) == kept(before)


def test_open_image_that_grows_keeps_them(images: Images) -> None:
    image = exotic(images)
    before = bytes(image.content)
    disk: Disk = images.open("image")
    disk.write(0, b"x" * MIB)
    disk.ctx.run(disk.node.truncate(8192 * MIB))
    disk.write(8000 * MIB, b"y" * MIB)
    disk.close()
    assert kept(image.content) == kept(before)
    assert image.content[88:96] == bytes(8), "autoclear bits whose data we don't know"
    again = images.open("image", read_only=True)
    header = again.driver.image.header
    assert header.extension(0x6E657721) == b"what nobody knows"
    assert len(header.extensions) == 5
    assert header.backing_file == "base"
    again.close()
