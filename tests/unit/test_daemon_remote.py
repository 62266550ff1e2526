# SPDX-License-Identifier: Apache-2.0
"""A daemon whose image is another server's export, and its end when that one no longer answers."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from blockemu.addresses import UnixAddress
from blockemu.config import serve_config
from blockemu.drivers.errors import ImageError
from blockemu.limits import Limits
from tests.e2e.raw_nbd import RawNbd
from tests.peers.process import nbd_uri
from tests.peers.scripted_nbd import Client, ScriptedNbd
from tests.unit.daemon_thread import DaemonThread
from tests.unit.qmp.test_nbd_server import Qmp

MIB = 1 << 20
SHORT_NS = 200_000_000
ENDS_WITHIN_S = 10.0


@pytest.mark.parametrize("command", [0, 1, 3])
def test_the_daemon_ends_though_the_server_of_its_image_never_answers(
    tmp_path: Path, command: int
) -> None:
    """A read, a write or a flush hangs below when the daemon is told to stop: what is to be lost is
    said, and it ends."""
    hangs = threading.Event()

    def serve(client: Client) -> None:
        client.negotiate()
        client.request()
        hangs.set()
        client.receive(1 << 30)

    limits = dataclasses.replace(
        Limits(), close_linger_ns=SHORT_NS, close_silence_ns=SHORT_NS, remote_linger_ns=SHORT_NS
    )
    config = serve_config(
        [nbd_uri(tmp_path / "s")], names=["disk"], fmt="raw",
        address=UnixAddress(str(tmp_path / "daemon")), limits=limits,
    )  # fmt: skip
    with (
        ScriptedNbd(tmp_path / "s", serve),
        DaemonThread(config) as running,
        RawNbd.connected(tmp_path / "daemon", "disk") as client,
    ):
        length = 0 if command == 3 else 512
        client.send(command, 0, length, payload=bytes(length) if command == 1 else b"")
        assert hangs.wait(30)
        begun = time.monotonic()
        with pytest.raises(ImageError, match=r"flush failed: .*no answer .* is stopping"):
            running.stop()
        assert time.monotonic() - begun < ENDS_WITHIN_S


@pytest.mark.parametrize("connections", [1, 3])
def test_a_disk_that_grew_below_grows_above_when_it_is_asked_to(
    tmp_path: Path, connections: int
) -> None:
    """`block_resize` on the server, then on the daemon that has its export; a client of that one
    writes to the new end meanwhile."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    below = serve_config(
        [str(disk)], names=["disk"], fmt="raw", address=UnixAddress(str(tmp_path / "below")),
        control_path=str(tmp_path / "below.qmp"),
    )  # fmt: skip
    server = f'"server":{{"type":"unix","path":"{tmp_path / "below"}"}}'
    file = f'{{"driver":"nbd",{server},"export":"disk","multi-conn":{connections}}}'
    above = serve_config(
        [f'json:{{"driver":"raw","file":{file}}}'], names=["disk"],
        address=UnixAddress(str(tmp_path / "above")), control_path=str(tmp_path / "above.qmp"),
    )  # fmt: skip
    with DaemonThread(below), DaemonThread(above):
        sizes = []
        for name in ("above", "below", "above"):
            qmp = Qmp(tmp_path / f"{name}.qmp")
            node = qmp("query-block-exports")[0]["node-name"]
            sizes.append(qmp("block_resize", size=2 * MIB, **{"node-name": node}))
            qmp.close()
        assert f"has {MIB} bytes" in sizes[0]
        assert sizes[1:] == [{}, {}]
        with RawNbd.connected(tmp_path / "above", "disk") as client:
            assert client.size_bytes == 2 * MIB
            assert client.write(2 * MIB - 512, b"x" * 512) == 0
            assert client.flush() == 0
    assert disk.read_bytes() == bytes(2 * MIB - 512) + b"x" * 512
