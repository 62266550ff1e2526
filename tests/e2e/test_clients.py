# SPDX-License-Identifier: Apache-2.0
"""Real clients and each way of host I/O, in both formats: what they read is what was written.

Which clients there are, and by which doors they come, is in test_client_matrix.py.
Each test starts a daemon of its own. After it has stopped, the image file itself is looked at
with qemu-img, without blockemu in between.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.images import assert_sound, make_content
from tests.peers.fio import Fio
from tests.peers.libnbd import require_libnbd
from tests.peers.nbd_tools import NbdCopy, NbdInfo
from tests.peers.qemu import QemuImg, QemuIo, ToolFailed
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 24 * MIB
BOTH_FORMATS = pytest.mark.parametrize("fmt", ["raw", "qcow2"])
# (--cache, --aio): each way in which host I/O is done.
HOST_IO_MODES = [
    ("writeback", "threads"),
    ("direct", "native"),
    ("direct", "threads"),
]
ALL_HOST_IO = pytest.mark.parametrize(("cache", "aio"), HOST_IO_MODES)

pytestmark = pytest.mark.usefixtures("qemu_tools")


@pytest.fixture
def qemu_tools() -> None:
    """Every test here makes its images with qemu-img and looks at them with qemu-io."""
    require_peer("qemu-img")
    require_peer("qemu-io")


def make_image(folder: Path, fmt: str, content: Path | None = None) -> Path:
    """An image, empty or with `content`."""
    image = folder / f"disk.{fmt}"
    if content is None:
        return QemuImg.create(image, SIZE_BYTES, fmt=fmt)
    QemuImg.convert(content, image, source_fmt="raw", target_fmt=fmt)
    return image


@ALL_HOST_IO
@BOTH_FORMATS
def test_qemu_img_convert_from_an_export_copies_it(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str
) -> None:
    content = make_content(direct_dir / "content", size_bytes=SIZE_BYTES)
    image = make_image(direct_dir, fmt, content)
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        target = direct_dir / "copy.qcow2"
        QemuImg.convert(server.uri, target, source_fmt="raw", target_fmt="qcow2")
    QemuImg.compare(target, content, one_fmt="qcow2")


@ALL_HOST_IO
@BOTH_FORMATS
def test_qemu_img_convert_into_an_export_writes_it(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str
) -> None:
    content = make_content(direct_dir / "content", size_bytes=SIZE_BYTES)
    image = make_image(direct_dir, fmt)
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        QemuImg.convert(content, server.uri, source_fmt="raw", target_fmt="raw", existing=True)
        QemuImg.compare(server.uri, content)
    QemuImg.compare(image, content, one_fmt=fmt)
    assert_sound(image, fmt)


@ALL_HOST_IO
@BOTH_FORMATS
def test_qemu_io_patterns_verify_at_any_alignment(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str
) -> None:
    image = make_image(direct_dir, fmt)
    places = [("0", "4k"), ("1M", "512"), ("65535", "2"), ("3145727", "131075"), ("23M", "1M")]
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        qemu_io = QemuIo(server.uri)
        for number, (offset, length) in enumerate(places, start=1):
            qemu_io.run(
                f"write -P {number} {offset} {length}", f"read -P {number} {offset} {length}"
            )
        qemu_io.run("read -P 0 4k 61439", "read -P 0 65537 4k", "read -P 0 8M 4M", "flush")
    on_disk = QemuIo(image, fmt=fmt)
    for number, (offset, length) in enumerate(places, start=1):
        on_disk.run(f"read -P {number} {offset} {length}")
    assert_sound(image, fmt)


@ALL_HOST_IO
@BOTH_FORMATS
@pytest.mark.parametrize("flag", ["", "-u"], ids=["keep-allocated", "unmap"])
def test_qemu_io_write_zeroes_reads_back_as_zeroes(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str, flag: str
) -> None:
    image = make_image(direct_dir, fmt)
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        QemuIo(server.uri).run(
            "write -P 5 0 8M",
            f"write -z {flag} 1M 2M",
            f"write -z {flag} 5M 12345",
            f"write -z {flag} 6291457 3",
            "read -P 5 0 1M",
            "read -P 0 1M 2M",
            "read -P 5 3M 2M",
            "read -P 0 5M 12345",
            "read -P 5 5255225 4k",
            "read -P 5 6M 1",
            "read -P 0 6291457 3",
            "read -P 5 6291460 1M",
        )
    QemuIo(image, fmt=fmt).run("read -P 0 1M 2M", "read -P 5 3M 2M")
    assert_sound(image, fmt)


@ALL_HOST_IO
@BOTH_FORMATS
def test_qemu_io_discard_leaves_its_neighbours_alone(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str
) -> None:
    image = make_image(direct_dir, fmt)
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        QemuIo(server.uri).run(
            "write -P 6 0 8M",
            "discard 1M 2M",
            "discard 5000001 77777",
            "read -P 6 0 1M",
            "read -P 6 3M 1854273",
            "read -P 6 5077778 1M",
            "write -P 9 1M 64k",
            "read -P 9 1M 64k",
        )
    QemuIo(image, fmt=fmt).run("read -P 6 0 1M", "read -P 9 1M 64k", "read -P 6 3M 1854273")
    assert_sound(image, fmt)


def test_discard_gives_room_back_in_a_raw_file(tmp_path: Path, serve: Serve) -> None:
    image = make_image(tmp_path, "raw")
    with serve(image, fmt="raw") as server:
        QemuIo(server.uri).run("write -P 6 0 16M", "flush")
        full = image.stat().st_blocks
        QemuIo(server.uri).run("discard 0 16M", "flush")
        emptied = image.stat().st_blocks
    assert full >= 16 * MIB // 512
    assert emptied < full // 2


@BOTH_FORMATS
def test_read_only_export_says_so_and_refuses_writes(
    tmp_path: Path, serve: Serve, fmt: str
) -> None:
    require_peer("nbdinfo")
    image = make_image(tmp_path, fmt, make_content(tmp_path / "content", size_bytes=SIZE_BYTES))
    before = image.read_bytes()
    with serve(image, fmt=fmt, read_only=True) as server:
        assert NbdInfo.describe(server.uri)["is_read_only"]
        with pytest.raises(ToolFailed, match=r"[Pp]ermi|[Rr]ead.only"):
            QemuIo(server.uri).run("write 0 4k")
    assert image.read_bytes() == before


@ALL_HOST_IO
@BOTH_FORMATS
def test_nbdcopy_both_ways_returns_the_same_bytes(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str
) -> None:
    require_peer("nbdcopy")
    content = make_content(direct_dir / "content", size_bytes=SIZE_BYTES)
    image = make_image(direct_dir, fmt)
    back = direct_dir / "back"
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        NbdCopy.copy(content, server.uri)
        NbdCopy.copy(server.uri, back)
    assert back.read_bytes() == content.read_bytes()
    QemuImg.compare(image, content, one_fmt=fmt)
    assert_sound(image, fmt)


@ALL_HOST_IO
@BOTH_FORMATS
def test_fio_verifies_every_block_it_wrote(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str
) -> None:
    require_peer("fio")
    image = make_image(direct_dir, fmt)
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        Fio(server.uri).verify(size_bytes=16 * MIB, block_bytes=4096, depth=32)
        Fio(server.uri).verify(size_bytes=24 * MIB, block_bytes=65536, depth=16, seed=2)
    assert_sound(image, fmt)


@ALL_HOST_IO
@BOTH_FORMATS
def test_libnbd_commands_in_flight_together_all_land(
    direct_dir: Path, serve: Serve, fmt: str, cache: str, aio: str
) -> None:
    nbd = require_libnbd()
    image = make_image(direct_dir, fmt)
    rng = random.Random(11)
    chunk = 40961  # odd on purpose: neighbours share sectors, pages and clusters
    expected = rng.randbytes(chunk * 200)
    with serve(image, fmt=fmt, cache=cache, aio=aio) as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        order = list(range(200))
        rng.shuffle(order)
        pending = []
        for index in order:
            piece = bytearray(expected[index * chunk : (index + 1) * chunk])
            buffer = nbd.Buffer.from_bytearray(piece)
            pending.append((handle.aio_pwrite(buffer, index * chunk), buffer))
        while handle.aio_in_flight() > 0:
            handle.poll(-1)
        for cookie, _buffer in pending:
            assert handle.aio_command_completed(cookie)
        assert handle.pread(len(expected), 0) == expected
        handle.flush()
        handle.zero(MIB, 0)
        handle.trim(MIB, MIB)
        assert handle.pread(MIB, 0) == bytes(MIB)
        assert handle.pread(chunk, 2 * MIB) == expected[2 * MIB : 2 * MIB + chunk]
        handle.pwrite(b"x" * 1000, SIZE_BYTES - 1000, nbd.CMD_FLAG_FUA)
        assert handle.pread(1000, SIZE_BYTES - 1000) == b"x" * 1000
        handle.shutdown()
    QemuIo(image, fmt=fmt).run(f"read -P 0x78 {SIZE_BYTES - 1000} 1000")
    assert_sound(image, fmt)


@BOTH_FORMATS
def test_two_connections_see_each_others_flushed_writes(
    tmp_path: Path, serve: Serve, fmt: str
) -> None:
    nbd = require_libnbd()
    with serve(make_image(tmp_path, fmt), fmt=fmt) as server:
        one, other = nbd.NBD(), nbd.NBD()
        one.connect_uri(server.uri)
        other.connect_uri(server.uri)
        for turn in range(1, 51):
            writer, reader = (one, other) if turn % 2 else (other, one)
            data = bytes([turn]) * 70000
            writer.pwrite(data, turn * 70000)
            writer.flush()
            assert reader.pread(70000, turn * 70000) == data
        one.shutdown()
        other.shutdown()


@pytest.mark.parametrize("length", [1, 511, 513, 4097, MIB + 333])
@pytest.mark.parametrize("cache", ["writeback", "direct"])
def test_raw_file_of_any_length_is_served_to_the_byte(
    direct_dir: Path, serve: Serve, cache: str, length: int, only_ours: None
) -> None:
    nbd = require_libnbd()
    image = direct_dir / "odd.raw"
    content = random.Random(length).randbytes(length)
    image.write_bytes(content)
    with serve(image, fmt="raw", cache=cache) as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        assert handle.get_size() == length
        assert handle.pread(length, 0) == content
        handle.pwrite(b"z", length - 1)
        handle.flush()
        handle.shutdown()
    assert image.read_bytes() == content[:-1] + b"z"


def test_backing_chain_of_both_formats_reads_as_qemu_img_sees_it(
    tmp_path: Path, serve: Serve
) -> None:
    content = make_content(tmp_path / "base.raw", size_bytes=SIZE_BYTES)
    middle = QemuImg.create(
        tmp_path / "middle.qcow2",
        None,
        backing=content,
        backing_fmt="raw",
        options={"cluster_size": 4096},
    )
    QemuIo(middle, fmt="qcow2").run("write -P 1 1M 5000", "write -z 2M 1M")
    top = QemuImg.create(tmp_path / "top.qcow2", None, backing=middle, backing_fmt="qcow2")
    QemuIo(top, fmt="qcow2").run("write -P 2 4M 70000")
    reference = tmp_path / "reference"
    QemuImg.convert(top, reference, source_fmt="qcow2", target_fmt="raw")
    with serve(top, fmt="qcow2") as server:
        QemuImg.compare(server.uri, reference)
        QemuIo(server.uri).run("write -P 3 1048577 3", "read -P 3 1048577 3", "read -P 1 1M 1")
    assert_sound(top, "qcow2")
    QemuIo(middle, fmt="qcow2").run("read -P 1 1M 5000")
