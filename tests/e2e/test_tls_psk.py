# SPDX-License-Identifier: Apache-2.0
"""TLS by pre-shared keys, with real clients and servers. Python has them from 3.13 on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from blockemu.drivers.crypto.tls_psk import is_supported
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuNbd, run_tool
from tests.peers.requirement import require_peer
from tests.unit.img.side_by_side import Outcome, our_output, ours

MIB = 1 << 20
KEY = "0011223344556677889900aabbccddeeff"

pytestmark = [
    pytest.mark.usefixtures("only_ours"),
    pytest.mark.skipif(not is_supported(), reason="pre-shared keys take Python 3.13 or later"),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    for tool in ("qemu-img", "qemu-nbd", "nbdinfo"):
        require_peer(tool)
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(3).randbytes(4 * MIB))
    return path


def keys(folder: Path, *lines: str) -> Path:
    """A folder of keys."""
    folder.mkdir()
    file = folder / "keys.psk"
    file.touch(mode=0o600)
    file.write_text("".join(f"{line}\n" for line in lines))
    return folder


def credentials(folder: Path, endpoint: str, more: str = "") -> str:
    return f"tls-creds-psk,id=tls0,dir={folder},endpoint={endpoint}{more}"


def uri(socket_path: Path, folder: Path, user: str) -> str:
    path = folder / "keys.psk"
    return f"nbds+unix://{user}@/disk?socket={socket_path}&tls-psk-file={path}"


def daemon(image: Path, socket_path: Path, folder: Path, more: str = "") -> BlockemuDaemon:
    tls = ["--object", credentials(folder, "server", more), "--tls-creds", "tls0"]
    return BlockemuDaemon(image, fmt="raw", socket_path=socket_path, export="disk", extra=tls)


@pytest.mark.parametrize(
    "more", ["", ",priority=NORMAL:-VERS-TLS1.3", ",priority=NORMAL:-VERS-TLS1.2"]
)
def test_who_has_the_key_comes_in(
    image: Path, socket_path: Path, tmp_path: Path, more: str
) -> None:
    both = keys(tmp_path / "keys", f"bob:{KEY[::-1]}", f"alice:{KEY}")
    target = tmp_path / "copy"
    with daemon(image, socket_path, both, more):
        assert "with TLS" in run_tool(["nbdinfo", uri(socket_path, both, "alice")]).stdout
        our_output("convert", "-f", "raw", "-O", "raw", uri(socket_path, both, "bob"), target)
        named = credentials(both, "client", ",username=alice")
        options = (
            f"driver=nbd,server.type=unix,server.path={socket_path},export=disk,tls-creds=tls0"
        )
        theirs = ["qemu-img", "info", "--object", named, "--image-opts"]
        run_tool([*theirs, f"{options},tls-hostname=localhost"])
        our_output("info", "--object", named, "--image-opts", options)
    assert target.read_bytes() == image.read_bytes()


def test_who_has_another_key_stays_out(
    image: Path, socket_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = keys(tmp_path / "keys", f"alice:{KEY}")
    bad = keys(tmp_path / "other", f"alice:{KEY[::-1]}", f"bob:{KEY}")
    with daemon(image, socket_path, good):
        for user in ("alice", "bob"):
            said: Outcome = ours(capfd, "info", uri(socket_path, bad, user))
            assert said.code == 1
            assert said.err.count("\n") == 1
            assert run_tool(["nbdinfo", uri(socket_path, bad, user)], check=False).code != 0
        assert run_tool(["nbdinfo", uri(socket_path, good, "alice")]).code == 0


def test_our_client_works_with_qemu_nbd(image: Path, socket_path: Path, tmp_path: Path) -> None:
    folder = keys(tmp_path / "keys", f"qemu:{KEY}")
    source = tmp_path / "source"
    source.write_bytes(random.Random(4).randbytes(4 * MIB))
    server = QemuNbd(image, fmt="raw", socket_path=socket_path, export="disk")
    server.command[1:1] = ["--object", credentials(folder, "server"), "--tls-creds", "tls0"]
    with server:
        to = uri(socket_path, folder, "qemu")
        our_output("convert", "-n", "-f", "raw", "-O", "raw", source, to)
    assert image.read_bytes() == source.read_bytes()
