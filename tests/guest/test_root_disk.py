# SPDX-License-Identifier: Apache-2.0
"""A machine whose root disk is an export, through QEMU's block layer (`-drive file=nbd+unix:...`).

It is shut down in good order once and, on the other format, has its power cut while it writes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import Boot
from tests.guest.files import make_root_disk
from tests.guest.images import assert_sound_inside
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 64 * MIB

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

# Goes on changing the file system.
BUSY = """
    (while :; do
        rm -rf copies
        mkdir copies
        cp /sbin/* copies
    done) >/dev/null 2>&1 &
    until test -e copies/mke2fs; do usleep 10000; done
"""


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A unix socket's path has 107 bytes, pytest's may be longer."""
    with tempfile.TemporaryDirectory(prefix="bemu-") as folder:
        yield Path(folder, "nbd.sock")


@pytest.fixture
def image(initrd: Path, tmp_path: Path, fmt: str) -> Path:
    """The root disk; `initrd` for what that asks of the machine."""
    require_peer("qemu-img")
    made, folder = tmp_path / "made", tmp_path / "root"
    folder.mkdir()
    make_root_disk(made, size_bytes=SIZE_BYTES, folder=folder)
    image = tmp_path / f"disk.{fmt}"
    QemuImg.convert(made, image, source_fmt="raw", target_fmt=fmt)
    return image


def drive(server: BlockemuDaemon) -> str:
    """The option's value for a disk on an export."""
    return f"file={server.uri},format=raw,if=virtio,discard=unmap"


@pytest.mark.parametrize(("fmt", "ending"), [("raw", "shut down"), ("qcow2", "power cut")])
def test_machine_boots_from_an_export_and_finds_what_it_wrote(
    boot: Boot, image: Path, fmt: str, ending: str, socket_path: Path, tmp_path: Path
) -> None:
    with BlockemuDaemon(image, fmt=fmt, socket_path=socket_path, export="disk") as server:
        with boot(drives=(drive(server),), root="/dev/vda") as guest:
            guest.run("""
                grep -q '^/dev/vda / ext4' /proc/mounts
                cd /root
                dd if=/dev/urandom of=large bs=1M count=4 2>&1
                cp -r /sbin /etc .
                find . -type f ! -name sums | xargs sha256sum >sums
                cp large gone
                sync
                rm gone
            """)
            if ending == "shut down":
                guest.power_off()
            else:
                guest.run(f"cd /root; {BUSY}")
                guest.cut_power()
        with boot(drives=(drive(server),), root="/dev/vda") as guest:
            guest.run("""
                cd /root
                test "$(wc -l <sums)" -ge 5
                sha256sum -c -s sums
                rm -rf gone copies
                fstrim /
            """)
            guest.power_off()
    assert_sound_inside(image, fmt=fmt, folder=tmp_path)
