# SPDX-License-Identifier: Apache-2.0
"""What an export is told by its node: the host's disk, and a server behind the server."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blockemu.config import UnixAddress, serve_config
from blockemu.drivers.node import BlockDriverState
from blockemu.export_traits import has_one_cache, is_rotational
from tests.peers.nbd_tools import NbdInfo
from tests.peers.requirement import require_peer
from tests.unit.daemon_thread import DaemonThread


def node_on(path: Path) -> BlockDriverState:
    driver = SimpleNamespace(is_protocol=True, host_file=object(), multi_conn=True)
    node: Any = SimpleNamespace(driver=driver, filename=str(path))
    node.subtree = lambda: [node]
    return cast("BlockDriverState", node)


@pytest.mark.parametrize("partition", [False, True])
@pytest.mark.parametrize(("text", "rotational"), [("1\n", True), ("0\n", False), ("", False)])
def test_the_kernel_says_whether_the_disk_rotates(
    tmp_path: Path, text: str, rotational: bool, partition: bool
) -> None:
    """A partition has no queue of its own: its disk's folder, above it, has."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"")
    device = image.stat().st_dev
    disk = tmp_path / "sys" / "devices" / "sda"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "rotational").write_text(text)
    (disk / "sda1").mkdir()
    entries = tmp_path / "sys" / "dev" / "block"
    entries.mkdir(parents=True)
    target = disk / "sda1" if partition else disk
    (entries / f"{os.major(device)}:{os.minor(device)}").symlink_to(target)
    assert is_rotational(node_on(image), sysfs=tmp_path / "sys") is rotational


def test_a_file_without_a_device_does_not_rotate(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"")
    assert not is_rotational(node_on(image), sysfs=tmp_path)
    assert not is_rotational(node_on(tmp_path / "none"))


@pytest.mark.parametrize("upstream", [True, False])
def test_an_export_of_an_export_promises_no_more_than_that(upstream: bool) -> None:
    node = node_on(Path("none"))
    below: Any = SimpleNamespace(driver=SimpleNamespace(multi_conn=upstream))
    cast("Any", node).subtree = lambda: [node, below]
    assert has_one_cache(node) is upstream


def test_clients_are_told_in_the_flags(tmp_path: Path) -> None:
    require_peer("nbdinfo")
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    config = serve_config([str(image)], rotational=True, address=UnixAddress(str(tmp_path / "s")))
    with DaemonThread(config) as running:
        found = NbdInfo.describe(running.uris[0])
    assert found["is_rotational"] is True
    assert found["can_multi_conn"] is True
