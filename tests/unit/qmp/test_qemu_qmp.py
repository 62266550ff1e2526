# SPDX-License-Identifier: Apache-2.0
"""QEMU's own Python client (the package qemu.qmp), where it is installed, on a running daemon."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from blockemu.config import UnixAddress, serve_config
from tests.unit.daemon_thread import DaemonThread

qmp = pytest.importorskip("qemu.qmp", reason="pip install qemu.qmp")


async def converse(path: str) -> None:
    client = qmp.QMPClient("test")
    await client.connect(path)
    version = await client.execute("query-version")
    assert version["package"].startswith("blockemu ")
    (export,) = await client.execute("query-block-exports")
    assert export["id"] == "disk"
    with pytest.raises(qmp.ExecuteError) as caught:
        await client.execute("nope")
    assert "nope has not been found" in str(caught.value)
    answers = await asyncio.gather(*(client.execute("query-commands") for _ in range(20)))
    assert len({len(answer) for answer in answers}) == 1
    assert await client.execute("quit") == {}
    with contextlib.suppress(EOFError):
        await client.disconnect()  # it finds that the server has hung up


def test_qemus_own_client_converses_and_quits(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    config = serve_config(
        [str(tmp_path / "disk.raw")],
        address=UnixAddress(str(tmp_path / "s")),
        control_path=str(tmp_path / "c"),
    )
    with DaemonThread(config) as running:
        asyncio.run(converse(str(tmp_path / "c")))
        running.join()
