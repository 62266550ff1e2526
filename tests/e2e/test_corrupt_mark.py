# SPDX-License-Identifier: Apache-2.0
"""An image whose metadata turns out to be damaged while clients use it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuImg, QemuIo, run_tool

CLUSTER = 65536


def with_the_l1_table_counted_as_free(path: Path) -> Path:
    """A qcow2 image with its first two clusters written."""
    QemuImg.create(path, 16 << 20)
    QemuIo(path, fmt="qcow2").run("write -P 6 0 128k")
    image = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", image, 40)
    (reftable,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, reftable)
    struct.pack_into(">H", image, block + l1 // CLUSTER * 2, 0)
    path.write_bytes(image)
    return path


@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "python"])
def test_clients_of_an_image_that_turns_out_damaged_read_on_and_write_no_more(
    tmp_path: Path, socket_path: Path, native: str
) -> None:
    image = with_the_l1_table_counted_as_free(tmp_path / "disk.qcow2")
    daemon = BlockemuDaemon(image, fmt="qcow2", socket_path=socket_path, export="disk")
    daemon.environment["BLOCKEMU_NATIVE"] = native
    with daemon:
        client = QemuIo(daemon.uri)
        client.run("write -P 7 0 64k", "write -P 8 0 4k", "read -P 8 0 4k", "flush")
        for attempt in ("write -P 9 1M 64k", "write -P 9 0 4k", "write -z 64k 64k", "write 2M 4k"):
            said = client.run("read -P 8 0 4k", attempt, check=False)
            assert "Input/output error" in said, said
        client.run("read -P 8 0 4k", "read -P 7 4k 60k", "read -P 6 64k 64k", "read -P 0 1M 64k")
    assert "holds the active L1 table but is counted as free" in daemon.stderr
    assert f"blockemu img check -r all {image}" in daemon.stderr
    assert "Traceback" not in daemon.stderr
    assert QemuImg.info(image)["format-specific"]["data"]["corrupt"] is True
    run_tool(["qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", image], check=False)
    QemuIo(image, fmt="qcow2").run("read -P 8 0 4k", "read -P 7 4k 60k", "write -P 9 1M 64k")
    verdict = QemuImg.check(image)
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text


@pytest.mark.parametrize(("template", "goes_through"), [("none", True), ("constant", False)])
def test_overlap_check_is_the_users_to_choose(
    tmp_path: Path, socket_path: Path, template: str, goes_through: bool
) -> None:
    image = with_the_l1_table_counted_as_free(tmp_path / "disk.qcow2")
    daemon = BlockemuDaemon(
        image, fmt="qcow2", socket_path=socket_path, extra=["--overlap-check", template]
    )
    with daemon:
        said = QemuIo(daemon.uri).run("write -P 9 1M 64k", check=False)
    assert ("Input/output error" not in said) is goes_through
