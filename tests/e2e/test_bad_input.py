# SPDX-License-Identifier: Apache-2.0
"""Input that can't be served: one line on stderr with the name and the reason, exit status 1, no
traceback.

The daemon runs under an address-space limit, so that a table whose size comes from a forged header
can't be allocated unnoticed. Header offsets are those of the qcow2 specification."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e.raw_nbd import CMD_READ, NBD_EIO, NBD_OK, RawNbd
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuImg, QemuNbd, ToolFailed, ToolResult, run_tool
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 64 * MIB
CLUSTER_BYTES = 65536
# Far more than the daemon needs, far less than the forged tables claim.
ADDRESS_SPACE_BYTES = 2 << 30

pytestmark = pytest.mark.usefixtures("only_ours", "qemu_img")


@pytest.fixture
def qemu_img() -> None:
    """The images are made by qemu-img."""
    require_peer("qemu-img")


def bound_by_file_modes() -> list[str]:
    """What to put before a command so that file modes count for it, even for root."""
    if os.geteuid() != 0:
        return []
    require_peer("setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]


def serve_and_end(
    *words: str | Path, socket_path: Path | None, before: Sequence[str] = ()
) -> ToolResult:
    """Run ``blockemu serve`` with a command line that has to be refused."""
    command: list[str | Path] = [sys.executable, "-m", "blockemu", "serve", *words]
    if socket_path is not None:
        command += ["--socket", socket_path]
    if shutil.which("prlimit") is not None:
        command[:0] = ["prlimit", f"--as={ADDRESS_SPACE_BYTES}", "--"]
    return run_tool([*before, *command], check=False, timeout_s=30)


def assert_refused(result: ToolResult, name: str, reason: str) -> None:
    """One line, with the thing's name and a reason that matches."""
    assert result.code == 1, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert name in lines[0], lines[0]
    assert re.search(reason, lines[0], re.IGNORECASE), lines[0]


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """A sound image, to be damaged."""
    return QemuImg.create(tmp_path / "disk.qcow2", SIZE_BYTES)


def patch(image: Path, offset: int, kind: str, *values: int) -> None:
    """Overwrite big-endian fields."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(f">{kind}", *values))


def test_missing_image_is_named(tmp_path: Path, socket_path: Path) -> None:
    image = tmp_path / "nowhere.qcow2"
    result = serve_and_end("-f", "qcow2", image, socket_path=socket_path)
    assert_refused(result, str(image), "no such file")


def test_missing_image_without_format_is_named(tmp_path: Path, socket_path: Path) -> None:
    image = tmp_path / "nowhere.img"
    assert_refused(serve_and_end(image, socket_path=socket_path), str(image), "no such file")


def test_directory_as_image_is_refused(tmp_path: Path, socket_path: Path) -> None:
    assert_refused(
        serve_and_end("-f", "raw", tmp_path, socket_path=socket_path),
        str(tmp_path),
        "directory|regular",
    )


def test_unreadable_image_is_named(tmp_path: Path, socket_path: Path) -> None:
    image = tmp_path / "secret.raw"
    image.write_bytes(bytes(MIB))
    image.chmod(0)
    result = serve_and_end(
        "-f", "raw", image, socket_path=socket_path, before=bound_by_file_modes()
    )
    assert_refused(result, str(image), "permission denied")


def test_read_only_file_is_refused_for_writing_and_served_for_reading(
    tmp_path: Path, socket_path: Path
) -> None:
    image = tmp_path / "fixed.raw"
    image.write_bytes(bytes(MIB))
    image.chmod(0o400)
    result = serve_and_end(
        "-f", "raw", image, socket_path=socket_path, before=bound_by_file_modes()
    )
    assert_refused(result, str(image), "permission denied")
    daemon = BlockemuDaemon(image, fmt="raw", socket_path=socket_path, read_only=True)
    daemon.command[:0] = bound_by_file_modes()
    with daemon:
        assert QemuImg.info(daemon.uri)["virtual-size"] == MIB


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_image_that_qemu_has_open_is_refused(tmp_path: Path, run_dir: Path, fmt: str) -> None:
    require_peer("qemu-nbd")
    image = QemuImg.create(tmp_path / f"disk.{fmt}", SIZE_BYTES, fmt=fmt)
    with QemuNbd(image, fmt=fmt, socket_path=run_dir / "qemu.sock") as holder:
        run_tool(["qemu-img", "info", holder.uri])  # it has opened its image when it answers
        result = serve_and_end("-f", fmt, image, socket_path=run_dir / "ours.sock")
        assert_refused(result, str(image), "lock|in use")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_image_that_we_have_open_is_refused_by_qemu_and_by_ourselves(
    tmp_path: Path, run_dir: Path, fmt: str
) -> None:
    image = QemuImg.create(tmp_path / f"disk.{fmt}", SIZE_BYTES, fmt=fmt)
    with BlockemuDaemon(image, fmt=fmt, socket_path=run_dir / "one.sock"):
        with pytest.raises(ToolFailed, match="lock"):
            # A look at a raw image (info) asks for no lock; a copy wants one that excludes writers.
            QemuImg.convert(image, tmp_path / "copy", source_fmt=fmt, target_fmt="raw")
        result = serve_and_end("-f", fmt, image, socket_path=run_dir / "two.sock")
        assert_refused(result, str(image), "lock|in use")
    QemuImg.convert(image, tmp_path / "copy", source_fmt=fmt, target_fmt="raw")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_two_readers_share_an_image(tmp_path: Path, run_dir: Path, fmt: str) -> None:
    image = QemuImg.create(tmp_path / f"disk.{fmt}", SIZE_BYTES, fmt=fmt)
    one = BlockemuDaemon(image, fmt=fmt, socket_path=run_dir / "one.sock", read_only=True)
    two = BlockemuDaemon(image, fmt=fmt, socket_path=run_dir / "two.sock", read_only=True)
    with one, two:
        QemuImg.info(image, fmt=fmt)
        result = serve_and_end("-f", fmt, image, socket_path=run_dir / "three.sock")
        assert_refused(result, str(image), "lock|in use")


def test_backing_file_in_use_by_a_writer_is_refused(tmp_path: Path, run_dir: Path) -> None:
    base = QemuImg.create(tmp_path / "base.qcow2", SIZE_BYTES)
    top = QemuImg.create(tmp_path / "top.qcow2", None, backing=base, backing_fmt="qcow2")
    with BlockemuDaemon(base, fmt="qcow2", socket_path=run_dir / "one.sock"):
        result = serve_and_end("-f", "qcow2", top, socket_path=run_dir / "two.sock")
        assert_refused(result, "base.qcow2", "lock|in use")


# What is done to a sound 64 MiB image with 64 KiB clusters, and what the line has to say.
FORGERIES: dict[str, tuple[Sequence[tuple[int, str, int]], str]] = {
    "wrong magic": ([(0, "I", 0x12345678)], "magic|not a qcow2|not in qcow2"),
    "version 1": ([(4, "I", 1)], "version"),
    "version 9": ([(4, "I", 9)], "version"),
    "backing name past the end": ([(8, "Q", 1 << 40), (16, "I", 20)], "backing"),
    "backing name too long": ([(8, "Q", 0x200), (16, "I", 70000)], "backing"),
    "cluster bits 0": ([(20, "I", 0)], "cluster"),
    "cluster bits 8": ([(20, "I", 8)], "cluster"),
    "cluster bits 22": ([(20, "I", 22)], "cluster"),
    "cluster bits huge": ([(20, "I", 0xFFFFFFFF)], "cluster"),
    "size over what qcow2 can name": ([(24, "Q", 1 << 63)], "size|large|big|l1"),
    "size over what the L1 table covers": ([(24, "Q", 1 << 50)], "l1|size"),
    "encrypted, AES": ([(32, "I", 1)], "encrypt|crypt"),
    "encrypted, unknown method": ([(32, "I", 77)], "encrypt|crypt"),
    "L1 table of 32 GiB": ([(36, "I", 0xFFFFFFFF)], "l1"),
    "L1 table larger than the file": ([(36, "I", 1 << 20)], "l1"),
    "L1 table over the header": ([(40, "Q", 0)], "l1"),
    "L1 table not aligned": ([(40, "Q", 0x30000 + 8)], "l1"),
    "L1 table past the end": ([(40, "Q", 1 << 40)], "l1"),
    "L1 offset overflows": ([(40, "Q", (1 << 64) - CLUSTER_BYTES)], "l1"),
    "refcount table over the header": ([(48, "Q", 0)], "refcount"),
    "refcount table not aligned": ([(48, "Q", 0x10000 + 512)], "refcount"),
    "refcount table past the end": ([(48, "Q", 1 << 40)], "refcount"),
    "refcount table huge": ([(56, "I", 0xFFFFFFFF)], "refcount"),
    "refcount table larger than the file": ([(56, "I", 4096)], "refcount"),
    "no refcount table": ([(56, "I", 0)], "refcount"),
    "snapshots beyond any number": ([(60, "I", 0xFFFFFFFF), (64, "Q", 0x50000)], "snapshot"),
    "incompatible feature 5": ([(72, "Q", 1 << 5)], "feature"),
    "incompatible feature 63": ([(72, "Q", 1 << 63)], "feature"),
    "external data file": ([(72, "Q", 1 << 2)], "data file|feature"),
    "refcounts of 128 bits": ([(96, "I", 7)], "refcount"),
    "header of 4 bytes": ([(100, "I", 4)], "header"),
    "header longer than a cluster": ([(100, "I", CLUSTER_BYTES + 8)], "header"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_qcow2_header_is_refused(qcow2: Path, socket_path: Path, forgery: str) -> None:
    fields, reason = FORGERIES[forgery]
    for offset, kind, value in fields:
        patch(qcow2, offset, kind, value)
    result = serve_and_end("-f", "qcow2", qcow2, socket_path=socket_path)
    assert_refused(result, str(qcow2), reason)


@pytest.mark.parametrize("length", [0, 4, 71, 103, 512, CLUSTER_BYTES, 3 * CLUSTER_BYTES])
def test_truncated_qcow2_is_refused(qcow2: Path, socket_path: Path, length: int) -> None:
    os.truncate(qcow2, length)
    result = serve_and_end("-f", "qcow2", qcow2, socket_path=socket_path)
    assert_refused(result, str(qcow2), ".")


def test_unknown_incompatible_feature_is_told_by_the_name_in_the_image(
    qcow2: Path, socket_path: Path
) -> None:
    # The feature name table is an extension of qemu-img's headers; an entry: type, bit, name.
    with qcow2.open("r+b") as file:
        header = file.read(4096)
        table = header.index(struct.pack(">I", 0x6803F857))
        file.seek(table + 8)
        file.write(struct.pack(">BB46s", 0, 40, b"time travel"))
    patch(qcow2, 72, "Q", 1 << 40)
    result = serve_and_end("-f", "qcow2", qcow2, socket_path=socket_path)
    assert_refused(result, str(qcow2), "time travel")


def test_missing_backing_file_is_named(tmp_path: Path, socket_path: Path) -> None:
    base = QemuImg.create(tmp_path / "base.raw", SIZE_BYTES, fmt="raw")
    top = QemuImg.create(tmp_path / "top.qcow2", None, backing=base, backing_fmt="raw")
    base.unlink()
    result = serve_and_end("-f", "qcow2", top, socket_path=socket_path)
    assert_refused(result, "base.raw", "no such file")


def test_backing_cycle_is_refused(tmp_path: Path, socket_path: Path) -> None:
    one = QemuImg.create(tmp_path / "one.qcow2", SIZE_BYTES)
    two = QemuImg.create(tmp_path / "two.qcow2", None, backing=one, backing_fmt="qcow2")
    run_tool(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", two, "-F", "qcow2", one])
    result = serve_and_end("-f", "qcow2", one, socket_path=socket_path)
    assert_refused(result, "one.qcow2", "cycle|itself|loop")


def test_image_that_backs_itself_is_refused(qcow2: Path, socket_path: Path) -> None:
    run_tool(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", qcow2])
    result = serve_and_end("-f", "qcow2", qcow2, socket_path=socket_path)
    assert_refused(result, "disk.qcow2", "cycle|itself|loop")


def test_backing_chain_of_three_cycles_through_symlinks_is_refused(
    tmp_path: Path, socket_path: Path
) -> None:
    one = QemuImg.create(tmp_path / "one.qcow2", SIZE_BYTES)
    alias = tmp_path / "alias.qcow2"
    alias.symlink_to(one)
    run_tool(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", alias, "-F", "qcow2", one])
    result = serve_and_end("-f", "qcow2", one, socket_path=socket_path)
    assert_refused(result, ".qcow2", "cycle|itself|loop")


def test_probed_image_that_names_a_backing_file_is_refused_with_the_format_to_give(
    tmp_path: Path, socket_path: Path
) -> None:
    base = QemuImg.create(tmp_path / "base.raw", SIZE_BYTES, fmt="raw")
    top = QemuImg.create(tmp_path / "top.qcow2", None, backing=base, backing_fmt="raw")
    assert_refused(serve_and_end(top, socket_path=socket_path), str(top), "-f qcow2")


def test_probed_image_that_names_a_data_file_is_refused_with_the_format_to_give(
    tmp_path: Path, socket_path: Path
) -> None:
    image = QemuImg.create(
        tmp_path / "top.qcow2", SIZE_BYTES, options={"data_file": str(tmp_path / "data.raw")}
    )
    assert_refused(serve_and_end(image, socket_path=socket_path), str(image), "-f qcow2")


def test_probed_image_without_other_files_is_served(qcow2: Path, socket_path: Path) -> None:
    with BlockemuDaemon(qcow2, fmt=None, socket_path=socket_path) as daemon:
        assert QemuImg.info(daemon.uri)["virtual-size"] == SIZE_BYTES


def test_raw_image_whose_first_bytes_are_a_qcow2_header_is_served_raw_when_told(
    qcow2: Path, socket_path: Path
) -> None:
    length = qcow2.stat().st_size
    with BlockemuDaemon(qcow2, fmt="raw", socket_path=socket_path) as daemon:
        client = RawNbd.connected(daemon.socket_path)
        with client:
            assert client.size_bytes == length


def test_socket_path_in_use_is_refused_and_its_owner_goes_on(
    tmp_path: Path, socket_path: Path
) -> None:
    images = [tmp_path / "one.raw", tmp_path / "two.raw"]
    for image in images:
        image.write_bytes(bytes(MIB))
    with BlockemuDaemon(images[0], fmt="raw", socket_path=socket_path) as owner:
        result = serve_and_end("-f", "raw", images[1], socket_path=socket_path)
        assert_refused(result, str(socket_path), "in use")
        assert QemuImg.info(owner.uri)["virtual-size"] == MIB


def test_socket_path_that_is_a_file_is_refused_and_the_file_kept(
    tmp_path: Path, socket_path: Path
) -> None:
    image = tmp_path / "one.raw"
    image.write_bytes(bytes(MIB))
    socket_path.write_text("precious")
    result = serve_and_end("-f", "raw", image, socket_path=socket_path)
    assert_refused(result, str(socket_path), "socket|exists|in use")
    assert socket_path.read_text() == "precious"


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/nonexistent-folder/nbd.sock", "no such file"), (f"/tmp/{'x' * 120}.sock", "long|107|108")],
    ids=["no folder", "too long"],
)
def test_impossible_socket_path_is_refused(tmp_path: Path, path: str, reason: str) -> None:
    image = tmp_path / "one.raw"
    image.write_bytes(bytes(MIB))
    assert_refused(serve_and_end("-f", "raw", image, socket_path=Path(path)), path, reason)


@pytest.mark.parametrize("address", ["not an address", "300.1.2.3", "192.0.2.1", "nowhere.invalid"])
def test_bad_address_is_refused(tmp_path: Path, address: str) -> None:
    image = tmp_path / "one.raw"
    image.write_bytes(bytes(MIB))
    result = serve_and_end("-f", "raw", image, "--bind", address, "--port", "0", socket_path=None)
    assert_refused(result, address, ".")


def test_port_in_use_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "one.raw"
    image.write_bytes(bytes(MIB))
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        result = serve_and_end("-f", "raw", image, "--port", str(port), socket_path=None)
    assert_refused(result, str(port), "in use")


def test_two_images_of_one_stem_are_refused_with_both_named(
    tmp_path: Path, socket_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "disk.raw").write_bytes(bytes(MIB))
    images = [folder / "disk.raw" for folder in folders]
    assert_refused(serve_and_end("-f", "raw", *images, socket_path=socket_path), "disk", "name")


def test_second_image_that_is_bad_leaves_no_socket_behind(
    tmp_path: Path, socket_path: Path
) -> None:
    good = tmp_path / "good.raw"
    good.write_bytes(bytes(MIB))
    result = serve_and_end("-f", "raw", good, tmp_path / "bad.raw", socket_path=socket_path)
    assert_refused(result, "bad.raw", "no such file")
    assert not socket_path.exists()


Damage = Callable[[Path], None]


def _l1_entry_past_the_end(image: Path) -> None:
    patch(image, int.from_bytes(image.read_bytes()[40:48], "big"), "Q", 1 << 63 | 1 << 40)


def _l1_entry_unaligned(image: Path) -> None:
    patch(image, int.from_bytes(image.read_bytes()[40:48], "big"), "Q", 1 << 63 | 0x30200)


def _l2_entry(image: Path, entry: int) -> None:
    data = image.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    patch(image, l2, "Q", entry)


def _l2_entry_past_the_end(image: Path) -> None:
    _l2_entry(image, 1 << 63 | 1 << 41)


def _l2_entry_unaligned(image: Path) -> None:
    _l2_entry(image, 1 << 63 | 0x50200)


@pytest.mark.parametrize(
    "damage",
    [_l1_entry_past_the_end, _l1_entry_unaligned, _l2_entry_past_the_end, _l2_entry_unaligned],
)
def test_damaged_entry_fails_its_requests_and_the_server_stays_up(
    qcow2: Path, socket_path: Path, damage: Damage
) -> None:
    run_tool(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", qcow2])
    damage(qcow2)
    with BlockemuDaemon(qcow2, fmt="qcow2", socket_path=socket_path, read_only=True) as daemon:
        with RawNbd.connected(daemon.socket_path) as client:
            reply = client.call(CMD_READ, 0, 512)
            # Past the end of the file there is nothing: zeroes, as qemu reads them, or an error.
            assert reply.error in (NBD_OK, NBD_EIO)
            assert reply.data == bytes(len(reply.data))
        with RawNbd.connected(daemon.socket_path) as other:
            assert other.size_bytes == SIZE_BYTES
