# SPDX-License-Identifier: Apache-2.0
"""Serving images with an external data file: killed, discarded, locked, on both data paths."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.block_writer import BLOCK_BYTES, BlockWriter
from tests.e2e.conftest import Serve
from tests.e2e.raw_nbd import RawNbd
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuImg, QemuIo, ToolFailed
from tests.peers.requirement import require_peer

MIB = 1 << 20
BLOCKS = 2048
KILLS = 3
WRITES_MIN, WRITES_MAX = 20, 300


@pytest.fixture(params=[False, True], ids=["mapped", "raw"])
def raw(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def make(folder: Path, size: int, *, raw: bool, cluster_size: int = 65536) -> Path:
    require_peer("qemu-img")
    options: dict[str, str | int] = {
        "data_file": str(folder / "disk.data"),
        "data_file_raw": "on" if raw else "off",
        "cluster_size": cluster_size,
    }
    return QemuImg.create(folder / "disk.qcow2", size, options=options)


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize(
    ("cache", "aio", "cluster_size"),
    [("writeback", None, 4096), ("direct", "native", 65536)],
    ids=["writeback-4k", "direct-64k"],
)
def test_kill_under_write_load_keeps_every_flushed_byte(
    direct_dir: Path,
    serve: Serve,
    random_seed: int,
    raw: bool,
    cache: str,
    aio: str | None,
    cluster_size: int,
) -> None:
    rng = random.Random(f"{random_seed}-{raw}-{cache}")
    image = make(direct_dir, BLOCKS * BLOCK_BYTES, raw=raw, cluster_size=cluster_size)
    writer = BlockWriter(BLOCKS, rng)
    for _ in range(KILLS):
        server = serve(image, fmt="qcow2", cache=cache, aio=aio)
        with server, RawNbd.connected(server.socket_path, "disk") as client:
            writer.run(client, writes=rng.randint(WRITES_MIN, WRITES_MAX), at_end=server.kill)
        found = QemuImg.check(image)
        assert (found.corruptions, found.errors) == (0, 0), found.text
        if raw:
            QemuImg.compare(image, direct_dir / "disk.data", one_fmt="qcow2")
        with (
            serve(image, fmt="qcow2", cache=cache, aio=aio, read_only=True) as server,
            RawNbd.connected(server.socket_path, "disk") as client,
        ):
            writer.adopt(writer.find_generations(client, at_least=writer.flushed))


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "python"])
def test_discards_and_zeroes_of_a_client_give_the_data_files_space_back(
    tmp_path: Path, socket_path: Path, native: str, raw: bool
) -> None:
    image = make(tmp_path, 16 * MIB, raw=raw)
    daemon = BlockemuDaemon(image, fmt="qcow2", socket_path=socket_path, export="disk")
    daemon.environment["BLOCKEMU_NATIVE"] = native
    with daemon as server:
        QemuIo(server.uri).run(
            "write -P 6 0 16M",
            "read -P 6 0 16M",  # what is read goes the short way from now on, in C or Python
            "discard 0 6M",
            "write -z -u 6M 6M",
            "read -P 0 0 12M",
            "write -P 7 1M 64k",
            "read -P 7 1M 64k",
            "write -z 12M 100k",
            "read -P 0 12M 100k",
            "flush",
        )
    data = tmp_path / "disk.data"
    assert data.stat().st_blocks * 512 < 6 * MIB
    assert data.stat().st_size == 16 * MIB
    QemuIo(image, fmt="qcow2").run(
        "read -P 0 0 1M", "read -P 7 1M 64k", "read -P 0 1088k 11112k", "read -P 6 12388k 3996k"
    )
    if raw:
        QemuImg.compare(image, data, one_fmt="qcow2")


@pytest.mark.usefixtures("only_ours")
def test_data_file_in_use_is_nobody_elses_to_write(
    tmp_path: Path, socket_path: Path, serve: Serve
) -> None:
    image = make(tmp_path, 4 * MIB, raw=True)
    with serve(image, fmt="qcow2"), pytest.raises(ToolFailed, match="lock"):
        QemuIo(tmp_path / "disk.data").run("write 0 64k")
    QemuIo(tmp_path / "disk.data").run("write -P 3 0 64k")
    with serve(image, fmt="qcow2") as server:
        QemuIo(server.uri).run("read -P 3 0 64k", "read -P 0 64k 64k")
