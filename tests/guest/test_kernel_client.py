# SPDX-License-Identifier: Apache-2.0
"""The kernel's own NBD client: `nbd-client` and the nbd driver of a Debian kernel, in a guest.

Each test attaches a device of its own to an export of its own; the guest is one for all of them.
After the daemon has stopped, the image is looked at with qemu-img and e2fsck on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.images import assert_sound
from tests.guest.images import assert_sound_inside
from tests.guest.machine import HOST, Guest
from tests.peers.blockemu import BlockemuTcpDaemon
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 64 * MIB
BOTH_FORMATS = pytest.mark.parametrize("fmt", ["raw", "qcow2"])
DEVICES = itertools.cycle(range(16))  # as many as the driver makes

# The guest's boot counts for the first of them; its whole work is done by emulated processors.
pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

Attach = Callable[..., str]


@pytest.fixture
def image(tmp_path: Path, fmt: str) -> Path:
    """An empty image."""
    require_peer("qemu-img")
    return QemuImg.create(tmp_path / f"disk.{fmt}", SIZE_BYTES, fmt=fmt)


@pytest.fixture
def attach(guest: Guest) -> Iterator[Attach]:
    """`attach(server)`: the name of a device of the guest's, over two connections.

    `options` are nbd-client's.
    """
    device = f"/dev/nbd{next(DEVICES)}"

    def do(server: BlockemuTcpDaemon, options: str = "") -> str:
        where = f"{HOST} {server.port} {device}"
        guest.run(f"nbd-client -C 2 -N {server.export} {options} {where}")
        return device

    yield do
    if guest.usable:
        guest.attempt(f"cd /; umount {device}; nbd-client -d {device}")


def format_and_mount(guest: Guest, device: str) -> None:
    """An empty ext4 on /mnt that trims what it lets go of."""
    guest.run(f"mkfs.ext4 -q -b 4096 {device}; mount -o discard {device} /mnt")


def allocated_bytes(image: Path) -> int:
    """What the host's file system has given to the image."""
    return image.stat().st_blocks * 512


@BOTH_FORMATS
def test_files_are_whole_after_detaching_and_attaching_again(
    guest: Guest, attach: Attach, image: Path, fmt: str, tmp_path: Path
) -> None:
    with BlockemuTcpDaemon(image, fmt=fmt) as server:
        device = attach(server)
        format_and_mount(guest, device)
        guest.run(f"""
            cd /mnt
            dd if=/dev/urandom of=large bs=1M count=4 2>&1
            for name in a b c d e f; do
                mkdir $name
                for turn in 1 2 3 4 5; do
                    dd if=large of=$name/$turn bs=12345 count=7 skip=$turn 2>&1
                done
            done
            ln a/1 a/link
            rm -r b
            sync
            find . -type f | xargs sha256sum >/tmp/sums
            cd /
            fstrim /mnt
            umount /mnt
            e2fsck -fn {device}
            nbd-client -d {device}
            test "$(cat /sys/block/{device[5:]}/size)" = 0
        """)
        attach(server)
        guest.run(f"""
            e2fsck -fn {device}
            mount -o ro {device} /mnt
            cd /mnt
            sha256sum -c -s /tmp/sums
            test "$(wc -l </tmp/sums)" = "$(find . -type f | wc -l)"
            cd /
            umount /mnt
            nbd-client -d {device}
        """)
    assert_sound_inside(image, fmt=fmt, folder=tmp_path)


@BOTH_FORMATS
@pytest.mark.parametrize("how", ["mounted with discard", "fstrim"])
def test_trims_give_room_back_to_the_host(
    guest: Guest, attach: Attach, image: Path, fmt: str, how: str, tmp_path: Path
) -> None:
    with BlockemuTcpDaemon(image, fmt=fmt) as server:
        device = attach(server)
        format_and_mount(guest, device)
        if how == "fstrim":
            guest.run("mount -o remount,nodiscard /mnt")
        guest.run("dd if=/dev/urandom of=/mnt/large bs=1M count=8 2>&1; sync")
        full = allocated_bytes(image)
        guest.run("rm /mnt/large; sync")
        if how == "fstrim":
            assert allocated_bytes(image) >= full
            guest.run("fstrim /mnt")
        # ext4 trims behind the transaction, umount the last of it; and qcow2 lets go of clusters
        # when the table that named them is flushed.
        guest.run(f"umount /mnt; dd if=/dev/null of={device} conv=notrunc,fsync 2>&1")
        emptied = allocated_bytes(image)
    assert full >= 8 * MIB
    assert emptied <= full - 7 * MIB
    assert_sound_inside(image, fmt=fmt, folder=tmp_path)


@pytest.mark.parametrize("fmt", ["raw"])
def test_device_is_what_the_export_says(guest: Guest, attach: Attach, image: Path) -> None:
    with BlockemuTcpDaemon(image, fmt="raw") as server:
        queue = f"/sys/block/{attach(server)[5:]}/queue"
        found = guest.run(f"cat {queue}/write_cache {queue}/fua {queue}/rotational {queue}/../ro")
        connections = guest.run("netstat -tn | grep -c ESTABLISHED")
        size = guest.run(f"cat {queue}/../size")
        trims = guest.run(f"cat {queue}/discard_max_bytes")
    assert found.splitlines() == ["write back", "1", "0", "0"]
    assert int(connections) == 2
    assert int(size) * 512 == SIZE_BYTES
    assert int(trims) >= SIZE_BYTES


@BOTH_FORMATS
def test_read_only_export_is_a_read_only_device(
    guest: Guest, attach: Attach, image: Path, fmt: str
) -> None:
    before = image.read_bytes()
    with BlockemuTcpDaemon(image, fmt=fmt, extra=["--read-only"]) as server:
        device = attach(server)
        assert guest.run(f"blockdev --getro {device}").strip() == "1"
        code, _ = guest.attempt(f"dd if=/dev/zero of={device} bs=4k count=1 oflag=direct")
        assert code != 0
        guest.run(f"dd if={device} of=/dev/null bs=1M count=4 2>&1")
    assert image.read_bytes() == before


@pytest.mark.parametrize("fmt", ["raw"])
def test_unknown_export_is_refused_and_listed_ones_are_not(guest: Guest, image: Path) -> None:
    with BlockemuTcpDaemon(image, fmt="raw", export="the disk") as server:
        code, output = guest.attempt(f"nbd-client -N other {HOST} {server.port} /dev/nbd15")
        assert code != 0
        assert "the disk" in guest.run(f"nbd-client -l {HOST} {server.port} 2>&1")
    assert "Negotiation" in output


@BOTH_FORMATS
def test_two_devices_on_one_export_see_each_others_writes(
    guest: Guest, attach: Attach, image: Path, fmt: str
) -> None:
    with BlockemuTcpDaemon(image, fmt=fmt) as server:
        one = attach(server)
        other = f"/dev/nbd{next(DEVICES)}"
        guest.run(f"""
            nbd-client -C 2 -N disk {HOST} {server.port} {other}
            dd if=/dev/urandom of=/tmp/block bs=32k count=1 2>&1
            for turn in 1 2 3 4 5 6 7 8; do
                from={one} to={other}
                [ $((turn % 2)) = 0 ] || from={other} to={one}
                dd if=/tmp/block of=$from bs=32k seek=$turn oflag=direct conv=notrunc,fsync 2>&1
                dd if=$to of=/tmp/seen bs=32k skip=$turn count=1 iflag=direct 2>&1
                cmp /tmp/block /tmp/seen
            done
            nbd-client -d {other}
        """)


# Passes over the first 16 MiB, past the guest's page cache, until one fails.
LOAD = """
    (while dd if=/dev/zero of={device} bs=64k count=64 seek=512 oflag=direct conv=notrunc; do
        :
    done; echo it ended) >/tmp/load 2>&1 &
    until grep -q records /tmp/load; do usleep 10000; done
"""
LOAD_ENDS = "until grep -q 'it ended' /tmp/load; do usleep 10000; done; cat /tmp/load"


@BOTH_FORMATS
def test_detaching_in_the_middle_ends_writes_with_errors(
    guest: Guest, attach: Attach, image: Path, fmt: str
) -> None:
    with BlockemuTcpDaemon(image, fmt=fmt) as server:
        device = attach(server)
        guest.run(f"""
            dd if=/dev/urandom of=/tmp/kept bs=1M count=1 2>&1
            dd if=/tmp/kept of={device} bs=1M conv=notrunc,fsync 2>&1
        """)
        guest.run(LOAD.format(device=device) + f"nbd-client -d {device}")
        assert "rror" in guest.run(LOAD_ENDS)
        attach(server)
        guest.run(f"dd if={device} of=/tmp/seen bs=1M count=1 2>&1; cmp /tmp/kept /tmp/seen")
        guest.run(f"nbd-client -d {device}")
    assert_sound(image, fmt)
