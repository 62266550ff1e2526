# SPDX-License-Identifier: Apache-2.0
"""A daemon on top of another one's export: what is written through both is there, and block status
and dirty bitmaps say above what they say below."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.block_writer import BLOCK_BYTES, BlockWriter
from tests.e2e.raw_nbd import RawNbd
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.fio import Fio
from tests.peers.nbd_tools import NbdCopy
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuImg, QemuIo, QemuNbd, run_tool
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE = 32 * MIB

pytestmark = pytest.mark.usefixtures("only_ours")


def json_name(socket: Path, export: str, **options: str | int) -> str:
    """A name with options, as images are named anywhere."""
    more = "".join(f',"{key}":"{value}"' for key, value in options.items())
    server = f'"server":{{"type":"unix","path":"{socket}"}}'
    return f'json:{{"driver":"raw","file":{{"driver":"nbd",{server},"export":"{export}"{more}}}}}'


@contextmanager
def chain(
    image: Path, fmt: str, folder: Path, **options: str | int
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """The daemon that has the image, and the one on top of it; both have the export "disk"."""
    below, above = folder / "below", folder / "above"
    with (
        BlockemuDaemon(image, fmt=fmt, socket_path=below, export="disk") as lower,
        BlockemuDaemon(
            json_name(below, "disk", **options), fmt=None, socket_path=above, export="disk"
        ) as upper,
    ):
        yield lower, upper


def our_img() -> list[str]:
    return [sys.executable, "-m", "blockemu", "img"]


def test_fio_verifies_through_both(tmp_path: Path, run_dir: Path) -> None:
    for peer in ("fio", "qemu-img"):
        require_peer(peer)
    image = QemuImg.create(tmp_path / "d.qcow2", SIZE)
    with chain(image, "qcow2", run_dir, **{"multi-conn": 4}) as (_, upper):
        Fio(upper.uri).verify(size_bytes=4 * MIB)
    found = QemuImg.check(image)
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text


def test_what_is_known_of_each_block_holds_below(
    tmp_path: Path, run_dir: Path, random_seed: int
) -> None:
    """Writes, zeroes, trims and flushes above; the image says the same when all is closed."""
    require_peer("qemu-img")
    image = QemuImg.create(tmp_path / "d.qcow2", SIZE)
    writer = BlockWriter(SIZE // BLOCK_BYTES, random.Random(random_seed), trims_share=0.1)
    with (
        chain(image, "qcow2", run_dir, **{"multi-conn": 3}) as (_, upper),
        RawNbd.connected(upper.socket_path, "disk") as client,
    ):
        writer.run(client, writes=300, at_end=lambda: None)
    with (
        BlockemuDaemon(image, fmt="qcow2", socket_path=run_dir / "s", export="disk") as server,
        RawNbd.connected(server.socket_path, "disk") as client,
    ):
        writer.find_generations(client, at_least=writer.acknowledged)


def test_block_status_and_content_are_the_same_above_and_below(
    tmp_path: Path, run_dir: Path, random_seed: int
) -> None:
    """nbdinfo sees the same map, in as many pieces; nbdcopy with its four connections copies the
    same bytes."""
    for peer in ("qemu-img", "qemu-io", "nbdinfo", "nbdcopy"):
        require_peer(peer)
    rng = random.Random(random_seed)
    base = QemuImg.create(tmp_path / "base.qcow2", SIZE, options={"cluster_size": 4096})
    image = QemuImg.create(
        tmp_path / "d.qcow2", SIZE, options={"cluster_size": 4096}, backing=base,
        backing_fmt="qcow2",
    )  # fmt: skip
    for target in (base, image):
        commands = []
        for _ in range(300):
            verb = rng.choice(("write -P 17", "write -z", "write -zu"))
            start = rng.randrange(SIZE // 4096 - 16) * 4096
            commands.append(f"{verb} {start} {rng.randrange(1, 16) * 4096}")
        QemuIo(target, fmt="qcow2").run(*commands)
    with chain(image, "qcow2", run_dir) as (lower, upper):
        maps = [
            run_tool(["nbdinfo", "--map", "--json", server.uri]).stdout for server in (lower, upper)
        ]
        assert maps[0] == maps[1]
        assert maps[0].count("offset") > 200
        NbdCopy.copy(upper.uri, tmp_path / "copy.raw")
    QemuImg.compare(image, tmp_path / "copy.raw", one_fmt="qcow2")


@pytest.mark.parametrize("server", ["qemu-nbd", "ours"])
def test_a_dirty_bitmap_of_the_server_is_mapped_as_qemu_maps_it(
    tmp_path: Path, run_dir: Path, server: str
) -> None:
    """Dirty is what isn't present, as in QEMU, on which backups rely."""
    for peer in ("qemu-img", "qemu-io", "qemu-nbd"):
        require_peer(peer)
    image = QemuImg.create(tmp_path / "d.qcow2", SIZE)
    run_tool(["qemu-img", "bitmap", "--add", "--enable", image, "b"])
    QemuIo(image, fmt="qcow2").run("write 1M 3M", "write 20M 64k", "discard 2M 1M", "write 31M 1M")
    socket = run_dir / "s"
    export = (
        QemuNbd(image, fmt="qcow2", socket_path=socket, bitmaps=["b"], read_only=True)
        if server == "qemu-nbd"
        else BlockemuDaemon(
            image, fmt="qcow2", socket_path=socket, read_only=True, extra=["--bitmap", "b"]
        )
    )
    options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:b"
    with export:
        for verb in (["map"], ["map", "--output=json"]):
            theirs = run_tool(["qemu-img", *verb, "--image-opts", options]).stdout
            ours = run_tool([*our_img(), *verb, "--image-opts", options]).stdout
            assert ours == theirs
        run_tool([*our_img(), "convert", "--image-opts", "-O", "raw", options, tmp_path / "o.raw"])
    assert theirs.count('"present": false') == 3
    QemuImg.compare(image, tmp_path / "o.raw", one_fmt="qcow2")
