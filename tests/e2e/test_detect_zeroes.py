# SPDX-License-Identifier: Apache-2.0
"""`serve --detect-zeroes` and `--discard` for real clients, by the native data path and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuImg, QemuIo

MIB = 1 << 20


@pytest.fixture(params=["1", "0"], ids=["native", "python"])
def native(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def served(image: Path, fmt: str, socket_path: Path, native: str, *extra: str) -> BlockemuDaemon:
    daemon = BlockemuDaemon(image, fmt=fmt, socket_path=socket_path, export="disk", extra=extra)
    daemon.environment["BLOCKEMU_NATIVE"] = native
    return daemon


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_written_zeroes_of_a_raw_image_become_holes_with_unmap(
    tmp_path: Path, socket_path: Path, native: str, mode: str
) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"\x06" * (16 * MIB))
    with served(image, "raw", socket_path, native, "--detect-zeroes", mode) as server:
        QemuIo(server.uri).run(
            "read -P 6 0 16M",  # what is read goes the short way from now on, in C or Python
            "write -P 0 1M 14M",
            "write -P 9 8M 64k",
            "write -P 0 100 1000",
            "read -P 0 100 1000",
            "read -P 6 0 100",
            "read -P 0 1M 7M",
            "read -P 9 8M 64k",
            "flush",
        )
    QemuIo(image).run("read -P 9 8M 64k", "read -P 0 9M 6M", "read -P 6 15M 1M")
    kept = image.stat().st_blocks * 512
    assert kept < 4 * MIB if mode == "unmap" else kept >= 16 * MIB


@pytest.mark.parametrize("mode", ["on", "unmap"])
def test_written_zeroes_take_no_data_in_a_qcow2_image(
    tmp_path: Path, socket_path: Path, native: str, mode: str
) -> None:
    image = QemuImg.create(tmp_path / "disk.qcow2", 64 * MIB)
    with served(image, "qcow2", socket_path, native, "--detect-zeroes", mode) as server:
        QemuIo(server.uri).run(
            "write -P 6 0 1M", "read -P 6 0 1M", "write -P 0 0 512k", "write -P 0 8M 32M", "flush"
        )
    QemuIo(image, fmt="qcow2").run("read -P 0 0 512k", "read -P 6 512k 512k", "read -P 0 8M 32M")
    assert image.stat().st_size < 4 * MIB
    verdict = QemuImg.check(image)
    assert (verdict.corruptions, verdict.leaks) == (0, 0), verdict.text


@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_trims_give_space_back_or_dont(
    tmp_path: Path, socket_path: Path, native: str, discard: str
) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"\x06" * (16 * MIB))
    with served(image, "raw", socket_path, native, "--discard", discard) as server:
        QemuIo(server.uri).run("discard 0 8M", "write -z -u 8M 8M", "flush")
    kept = image.stat().st_blocks * 512
    assert kept >= 16 * MIB if discard == "ignore" else kept < MIB
    QemuIo(image).run("read -P 0 8M 8M", *(["read -P 6 0 8M"] if discard == "ignore" else []))
