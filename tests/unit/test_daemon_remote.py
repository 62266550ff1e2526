# SPDX-License-Identifier: Apache-2.0
"""A daemon whose image is another server's export, and its end when that one no longer answers."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from blockemu.config import UnixAddress, serve_config
from blockemu.drivers.errors import ImageError
from blockemu.limits import Limits
from tests.e2e.raw_nbd import RawNbd
from tests.peers.process import nbd_uri
from tests.peers.scripted_nbd import Client, ScriptedNbd
from tests.unit.daemon_thread import DaemonThread

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
