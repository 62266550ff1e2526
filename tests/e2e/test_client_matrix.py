# SPDX-License-Identifier: Apache-2.0
"""Every real client, by every door, on both formats.

One daemon for each door and format serves two exports: `content`, which clients read and compare
with what is known to be in it, and `scratch`, which each of them fills and reads back. When all
have been there, the images are looked at without blockemu in between.

What depends on how host I/O is done is in test_clients.py.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.doors import DOORS, Door, open_door
from tests.e2e.images import assert_sound, make_content
from tests.peers.fio import Fio
from tests.peers.libnbd import require_libnbd
from tests.peers.nbd_tools import NbdCopy, NbdFuse, NbdInfo
from tests.peers.qemu import QemuImg, run_tool
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 8 * MIB

pytestmark = pytest.mark.usefixtures("only_ours")


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def fmt(request: pytest.FixtureRequest) -> str:
    """The format of the images."""
    return str(request.param)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the export `content`, as a raw file."""
    return make_content(tmp_path_factory.mktemp("content") / "content", size_bytes=SIZE_BYTES)


@pytest.fixture(scope="module", params=DOORS)
def door(
    request: pytest.FixtureRequest,
    fmt: str,
    content: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Door]:
    """A daemon, and how to come to it."""
    require_peer("qemu-img")
    folder = tmp_path_factory.mktemp("door")
    images = {name: folder / f"{name}.{fmt}" for name in ("content", "scratch")}
    QemuImg.convert(content, images["content"], source_fmt="raw", target_fmt=fmt)
    QemuImg.create(images["scratch"], SIZE_BYTES, fmt=fmt)
    with open_door(request.param, images, fmt=fmt) as found:
        yield found
    for image in images.values():
        assert_sound(image, fmt)
    QemuImg.compare(images["content"], content, one_fmt=fmt)


@pytest.fixture
def fresh(tmp_path: Path, seed: int, request: pytest.FixtureRequest) -> Path:
    """A raw file for a client to put into `scratch`, where something else is."""
    path = tmp_path / "fresh"
    path.write_bytes(random.Random(f"{seed} {request.node.name}").randbytes(SIZE_BYTES))
    return path


# --- QEMU's tools ---


def qemu_img(door: Door, command: str, *arguments: str | Path) -> str:
    """Run it; what it printed."""
    return run_tool(["qemu-img", command, *door.qemu_objects, *arguments]).stdout


def test_qemu_img_tells_size_and_layout(door: Door, content: Path) -> None:
    export = door.image_opts("content")
    info = json.loads(qemu_img(door, "info", "--output=json", "--image-opts", export))
    assert info["virtual-size"] == SIZE_BYTES
    layout = json.loads(qemu_img(door, "map", "--output=json", "--image-opts", export))
    runs = [(run["start"], run["length"], run["zero"]) for run in layout]
    assert_layout(runs, content)


def test_qemu_img_copies_out_of_an_export(door: Door, content: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.qcow2"
    export = door.image_opts("content")
    qemu_img(door, "convert", "--image-opts", export, "-O", "qcow2", target)
    QemuImg.compare(target, content, one_fmt="qcow2")


def test_qemu_img_copies_into_an_export(door: Door, fresh: Path) -> None:
    export = door.image_opts("scratch")
    qemu_img(door, "convert", "-n", "-f", "raw", "--target-image-opts", fresh, export)
    file = f"driver=raw,file.driver=file,file.filename={fresh}"
    qemu_img(door, "compare", "--image-opts", export, file)


def test_qemu_io_writes_zeroes_and_discards(door: Door) -> None:
    require_peer("qemu-io")
    commands = ["write -P 5 0 4M", "write -z -u 1M 64k", "discard 2M 1M", "write -f -P 6 3000001 7"]
    commands += ["flush", "read -P 5 0 1M", "read -P 0 1M 64k", "read -P 6 3000001 7"]
    words = [word for command in commands for word in ("-c", command)]
    qemu_io = ["qemu-io", *door.qemu_objects, "--image-opts", *words, door.image_opts("scratch")]
    assert "failed" not in run_tool(qemu_io).stdout


# --- libnbd and its tools ---


def test_nbdinfo_tells_what_an_export_can(door: Door) -> None:
    require_peer("nbdinfo")
    found = NbdInfo.describe(door.uri("content"))
    assert NbdInfo.export_names(door.uri("")) == ["content", "scratch"]
    assert found["export-size"] == SIZE_BYTES
    assert "base:allocation" in found["contexts"]
    can = {"can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn"}
    can |= {"can_trim", "can_zero"}
    assert {name for name in can if not found[name]} == set()
    assert not found["is_read_only"]


def test_nbdinfo_maps_an_export(door: Door, content: Path) -> None:
    require_peer("nbdinfo")
    runs = NbdInfo.map(door.uri("content"))
    is_zero = {0: False, 2: True, 3: True}  # NBD_STATE_HOLE is 1, NBD_STATE_ZERO 2
    assert_layout([(offset, length, is_zero[state]) for offset, length, state in runs], content)


def test_nbdcopy_copies_out_of_an_export(door: Door, content: Path, tmp_path: Path) -> None:
    require_peer("nbdcopy")
    target = tmp_path / "copy"
    NbdCopy.copy(door.uri("content"), target, "--connections=4")
    assert target.read_bytes() == content.read_bytes()


def test_nbdcopy_copies_into_an_export(door: Door, fresh: Path, tmp_path: Path) -> None:
    require_peer("nbdcopy")
    NbdCopy.copy(fresh, door.uri("scratch"), "--connections=4")
    NbdCopy.copy(door.uri("scratch"), tmp_path / "copy", "--connections=4")
    assert (tmp_path / "copy").read_bytes() == fresh.read_bytes()


def test_nbdcopy_copies_from_export_to_export(door: Door, content: Path, tmp_path: Path) -> None:
    """Zeroes and holes, too, over what is there."""
    require_peer("nbdcopy")
    NbdCopy.copy(door.uri("content"), door.uri("scratch"), "--connections=4")
    NbdCopy.copy(door.uri("scratch"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content.read_bytes()


def test_nbdsh_reads_and_writes(door: Door, content: Path) -> None:
    """As the module that the program runs with the system's Python."""
    require_peer("nbdsh")
    nbdsh = [sys.executable, "-m", "nbd", "-u", door.uri("content")]
    length = 100_001
    script = f"import sys; sys.stdout.write(h.pread({length}, 4097).hex())"
    printed = run_tool([*nbdsh, "-c", script]).stdout
    assert bytes.fromhex(printed) == content.read_bytes()[4097 : 4097 + length]
    nbdsh[-1] = door.uri("scratch")
    script = "h.pwrite(b'nbdsh', 77); h.flush(); assert h.pread(5, 77) == b'nbdsh'"
    run_tool([*nbdsh, "-c", script])


def test_libnbd_asks_for_what_there_is(door: Door, content: Path) -> None:
    """Structured replies, and block status beside reads."""
    nbd = require_libnbd()
    expected = content.read_bytes()
    handle = connect(door, "content")
    assert handle.get_structured_replies_negotiated()
    assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    read = bytearray(SIZE_BYTES)
    runs: list[int] = []

    def chunk(data: bytes, offset: int, status: int, error: Any) -> None:
        assert error.value == 0
        read[offset : offset + len(data)] = data

    def status(context: str, offset: int, entries: list[int], error: Any) -> None:
        runs.extend(entries)

    handle.pread_structured(SIZE_BYTES, 0, chunk)
    handle.block_status(SIZE_BYTES, 0, status)
    handle.shutdown()
    assert read == expected
    assert sum(runs[::2]) >= MIB


def test_libnbd_has_many_writes_in_flight(door: Door, fresh: Path) -> None:
    nbd = require_libnbd()
    expected = fresh.read_bytes()
    handle = connect(door, "scratch")
    buffers = []  # must live as long as their commands
    for offset in random.Random(1).sample(range(0, SIZE_BYTES, 65536), SIZE_BYTES // 65536):
        buffers.append(nbd.Buffer.from_bytearray(bytearray(expected[offset : offset + 65536])))
        handle.aio_pwrite(buffers[-1], offset)
    while handle.aio_in_flight() > 0:
        handle.poll(-1)
    handle.flush()
    assert handle.pread(SIZE_BYTES, 0) == expected
    handle.shutdown()


def test_nbdfuse_shows_an_export_as_a_file(
    door: Door, content: Path, fresh: Path, tmp_path: Path
) -> None:
    require_peer("nbdfuse")
    require_peer("fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("nbdfuse wants /dev/fuse, which this machine doesn't give")
    with NbdFuse(door.uri("content"), tmp_path / "content") as mounted:
        assert mounted.file.read_bytes() == content.read_bytes()
    with NbdFuse(door.uri("scratch"), tmp_path / "scratch") as mounted:
        with mounted.file.open("r+b") as file:
            file.write(fresh.read_bytes())
        assert mounted.file.read_bytes() == fresh.read_bytes()
    NbdCopy.copy(door.uri("scratch"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == fresh.read_bytes()


# --- fio ---


def test_fio_verifies_what_it_wrote(door: Door) -> None:
    require_peer("fio")
    Fio(door.uri("scratch")).verify(size_bytes=2 * MIB, block_bytes=16384, depth=16)


def connect(door: Door, export: str) -> Any:
    """A handle of libnbd's, with base:allocation."""
    nbd = require_libnbd()
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(door.uri(export))
    return handle


def assert_layout(runs: list[tuple[int, int, bool]], content: Path) -> None:
    """Runs of (offset, length, whether it reads as zeroes) cover the export one after the other;
    what is said to be zeroes is, and some of what is zeroes is said to be."""
    data = content.read_bytes()
    position = 0
    for offset, length, is_zero in runs:
        assert offset == position
        position += length
        assert not is_zero or not any(data[offset:position])
    assert position == SIZE_BYTES
    assert any(is_zero for _, _, is_zero in runs)
