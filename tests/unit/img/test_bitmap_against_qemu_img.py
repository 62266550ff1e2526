# SPDX-License-Identifier: Apache-2.0
"""`img bitmap` beside `qemu-img bitmap`: the same bitmaps, the same refusals; what either has made,
the other uses.

Known differences: QEMU loses an image's bitmaps without a word when it is amended to compat=0.10,
and bitmaps of a disk of 0 bytes with a warning; we refuse both.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers import bitmap_commands
from blockemu.drivers.registry import Opener
from blockemu.img.info import open_layer
from blockemu.img.session import run_session
from tests.peers.nbd_tools import NbdInfo
from tests.peers.qemu import QemuImg, QemuIo, QemuNbd
from tests.peers.requirement import require_peer
from tests.unit.img.side_by_side import our_output, ours, theirs

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_peer("qemu-img")
    monkeypatch.chdir(tmp_path)


def bitmaps_of(path: str | Path) -> list[dict[str, Any]]:
    """As both list them."""
    found = json.loads(our_output("info", "--output=json", "-f", "qcow2", path))
    assert found == QemuImg.info(path, fmt="qcow2")
    assert our_output("info", path) == theirs("info", path).out
    listed: list[dict[str, Any]] = found["format-specific"]["data"].get("bitmaps", [])
    return listed


def check(path: str | Path) -> None:
    verdict = QemuImg.check(Path(path))
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text


STEPS = [
    "--add disk b",
    "--add -g 4k disk c",
    "--add -g 512 disk d",
    "--add --disable -g 2G disk e",
    "--disable --enable --disable disk b",
    "--enable disk e",
    "--merge b --merge c disk d",
    "--clear disk c",
    "--remove disk b",
    "--add --merge d --clear --merge c disk b",
    "--merge b disk b",
    "--remove --add -g 1M disk d",
    "--add --remove disk f",
    "--remove disk b",
    "--remove disk c",
    "--remove disk d",
    "--remove disk e",
]


@pytest.mark.parametrize("cluster", [512, 65536, 2 * MIB])
def test_same_steps_make_the_same_bitmaps(cluster: int) -> None:
    for folder in ("ours", "theirs"):
        Path(folder).mkdir()
        QemuImg.create(Path(folder, "disk"), 8 * MIB, options={"cluster_size": cluster})
    for number, step in enumerate(STEPS):
        words = step.split()
        at = words.index("disk")
        our_output("bitmap", *words[:at], "ours/disk", *words[at + 1 :])
        assert theirs("bitmap", *words[:at], "theirs/disk", *words[at + 1 :]).code == 0
        found = {fact["name"]: fact for fact in bitmaps_of("ours/disk")}
        assert found == {fact["name"]: fact for fact in bitmaps_of("theirs/disk")}
        check("ours/disk")
        if number % 4 == 1:
            for folder in ("ours", "theirs"):
                io = QemuIo(Path(folder, "disk"), fmt="qcow2")
                io.run(f"write {number * 300_000} 70000", f"write -z {number * 400_000} 512")
    assert not found


BAD = [
    ("--add disk there", "Operation add on bitmap there failed: Bitmap already exists: there"),
    ("--remove disk no", "Operation remove on bitmap no failed: Dirty bitmap 'no' not found"),
    ("--clear disk no", "Operation clear on bitmap no failed: Dirty bitmap 'no' not found"),
    ("--enable disk no", "Dirty bitmap 'no' not found"),
    ("--disable disk no", "Dirty bitmap 'no' not found"),
    ("--merge no disk there", "Operation merge on bitmap there failed: Dirty bitmap 'no' not"),
    ("--merge there disk no", "Dirty bitmap 'no' not found"),
    ("--add -g 100 disk b", "Granularity must be power of 2 and at least 512"),
    ("--add -g 256 disk b", "Granularity must be power of 2 and at least 512"),
    ("--add -g 4G disk b", "Granularity must be power of 2 and at least 512"),
    ("disk there", "Need at least one of --add, --remove, --clear, --enable, --disable, or"),
    ("--remove --add disk b", "Operation remove on bitmap b failed: Dirty bitmap 'b' not found"),
    ("-g 4k --clear disk there", "granularity only supported with --add"),
    ("-b larger --clear disk there", "Merge bitmap source file only supported with --merge"),
    ("-F qcow2 --merge there disk there", "-F only supported with -b"),
    ("-b larger -F qcow2 --merge b disk there",
     "Bitmaps are of different sizes (destination size is 1048576, source size is 2097152)"),
    ("-b larger -F qcow2 --merge c disk there", "Dirty bitmap 'c' not found"),
    ("--clear disk broken", "Bitmap 'broken' is inconsistent and cannot be used"),
    ("--enable disk broken", "Bitmap 'broken' is inconsistent and cannot be used"),
    ("--merge broken disk there", "Bitmap 'broken' is inconsistent and cannot be used"),
    ("--add old b", "Operation add on bitmap b failed"),
    ("--add -f raw flat b", "Operation add on bitmap b failed"),
]  # fmt: skip


def break_bitmap(path: Path, name: str) -> None:
    """As a crash would leave it: in use."""
    content = bytearray(path.read_bytes())
    at = content.rindex(name.encode()) - 24
    assert struct.unpack_from(">H", content, at + 18) == (len(name),)
    content[at + 15] |= 1
    path.write_bytes(content)


@pytest.fixture
def broken() -> Path:
    path = QemuImg.create(Path("disk"), MIB)
    for name in ("there", "broken"):
        assert theirs("bitmap", "--add", path, name).code == 0
    break_bitmap(path, "broken")
    return path


@pytest.mark.usefixtures("broken")
def test_what_they_refuse_we_refuse(capfd: pytest.CaptureFixture[str]) -> None:
    QemuImg.create(Path("larger"), 2 * MIB)
    assert theirs("bitmap", "--add", "larger", "b").code == 0
    QemuImg.create(Path("old"), MIB, options={"compat": "0.10"})
    QemuImg.create(Path("flat"), MIB, fmt="raw")
    before = bitmaps_of("disk")
    for words, message in BAD:
        found, wanted = ours(capfd, "bitmap", *words.split()), theirs("bitmap", *words.split())
        assert (found.code, wanted.code) == (1, 1), (words, found, wanted)
        assert message in wanted.err
        assert message in found.err
        assert found.err.startswith("blockemu: ")
        assert found.err.count("\n") == 1
    for words in ("--add disk", "--add"):
        assert ours(capfd, "bitmap", *words.split()).code == 2
    assert bitmaps_of("disk") == before
    check("disk")


def test_inconsistent_bitmap_is_listed_and_can_be_removed(broken: Path) -> None:
    assert bitmaps_of(broken)[1]["flags"] == ["in-use", "auto"]
    QemuIo(broken, fmt="qcow2").run("write 0 64k")
    our_output("bitmap", "--disable", broken, "there")
    assert [fact["flags"] for fact in bitmaps_of(broken)] == [[], ["in-use", "auto"]]
    our_output("bitmap", "--remove", broken, "broken")
    assert [fact["name"] for fact in bitmaps_of(broken)] == ["there"]
    check(broken)


def test_inconsistent_bitmap_keeps_the_size(
    broken: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for outcome in (ours(capfd, "resize", broken, "2M"), theirs("resize", broken, "2M")):
        assert outcome.code == 1
        assert "'broken' is inconsistent" in outcome.err
    check(broken)


def test_amend_to_version_2_is_refused(broken: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = ours(capfd, "amend", "-o", "compat=0.10", broken)
    assert found.code == 1
    assert "version 2 (compat=0.10), which has no bitmaps" in found.err
    for name in ("there", "broken"):
        our_output("bitmap", "--remove", broken, name)
    our_output("amend", "-o", "compat=0.10", broken)
    check(broken)


def test_bitmaps_of_an_image_with_an_external_data_file(
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = {"data_file": "data", "data_file_raw": "on", "cluster_size": 4096}
    path = QemuImg.create(Path("disk"), 64 * MIB, options=options)
    found = ours(capfd, "bitmap", "--add", path, "b")
    assert found.code == 1
    assert "another file, 'data', and its format was only guessed: say -f qcow2" in found.err
    written_by_us(path)
    check(path)
    assert dirty_by_qemu(path, "b14") == granules(WRITTEN, 1 << 14)
    assert len(bitmaps_of(path)) == 3
    our_output("bitmap", "-f", "qcow2", "--remove", path, "b9")
    check(path)
    QemuImg.compare(path, "data", one_fmt="qcow2")


def written_by_us(path: Path) -> None:
    """A few ranges, in three bitmaps of different granularity."""

    async def work(opener: Opener) -> None:
        node = await open_layer(opener, str(path), fmt="qcow2", read_only=False)
        for bits in (9, 14, 20):
            await bitmap_commands.add(node, f"b{bits}", granularity=1 << bits, persistent=True)
        await node.pwritev(5000, memoryview(b"x" * 600))
        await node.pwrite_zeroes(3 * MIB, MIB)
        await node.pdiscard(40 * MIB, 64 * 1024)
        await node.pwritev(64 * MIB - 1, memoryview(b"y"))
        await node.flush()
        await node.close()

    run_session(work)


def dirty_by_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    require_peer("qemu-nbd")
    require_peer("nbdinfo")
    socket = Path("nbd.sock").absolute()
    server = QemuNbd(path, fmt="qcow2", socket_path=socket, read_only=True, bitmaps=[name])
    with server as started:
        return NbdInfo.dirty_ranges(started.uri, name)


def dirty_by_us(path: Path, name: str) -> list[tuple[int, int]]:
    async def work(opener: Opener) -> list[tuple[int, int]]:
        node = await open_layer(opener, str(path), fmt="qcow2", read_only=True)
        try:
            return list((await bitmap_commands.find(node, name)).ranges())
        finally:
            await node.close()

    return run_session(work)


def granules(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Of a disk of 64 MiB: in whole granules, neighbours as one."""
    dirty: set[int] = set()
    for offset, length in ranges:
        dirty.update(range(offset // size, -(-(offset + length) // size)))
    found: list[tuple[int, int]] = []
    for at in sorted(dirty):
        if found and sum(found[-1]) == at * size:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((at * size, size))
    return found


WRITTEN = [(5000, 600), (3 * MIB, MIB), (40 * MIB, 65536), (64 * MIB - 1, 1)]


@pytest.mark.parametrize("cluster", [512, 65536])
def test_qemu_sees_what_we_recorded(cluster: int) -> None:
    path = QemuImg.create(Path("disk"), 64 * MIB, options={"cluster_size": cluster})
    written_by_us(path)
    check(path)
    for bits in (9, 14, 20):
        wanted = granules(WRITTEN, 1 << bits)
        assert dirty_by_qemu(path, f"b{bits}") == wanted
        assert dirty_by_us(path, f"b{bits}") == wanted


@pytest.mark.parametrize("cluster", [512, 65536])
def test_we_see_what_qemu_recorded(cluster: int) -> None:
    path = QemuImg.create(Path("disk"), 64 * MIB, options={"cluster_size": cluster})
    for bits in (9, 14, 20):
        assert theirs("bitmap", "--add", "-g", str(1 << bits), path, f"b{bits}").code == 0
    QemuIo(path, fmt="qcow2").run("write 5000 600", "write -z 3M 1M", "discard 40M 64k",
                                  "write 67108863 1")  # fmt: skip
    for bits in (9, 14, 20):
        assert dirty_by_us(path, f"b{bits}") == dirty_by_qemu(path, f"b{bits}")
        our_output("bitmap", "--merge", "b9", path, f"b{bits}")
    assert dirty_by_us(path, "b14") == dirty_by_qemu(path, "b14")
    check(path)


def test_bitmaps_live_through_commit_rebase_and_snapshots() -> None:
    base = QemuImg.create(Path("base"), 64 * MIB)
    our_output("bitmap", "--add", base, "below")
    QemuImg.create(Path("disk"), None, backing=Path("base"), backing_fmt="qcow2")
    written_by_us(Path("disk"))
    our_output("commit", "-f", "qcow2", "disk")
    assert dirty_by_us(base, "below")
    assert dirty_by_us(base, "below") == dirty_by_qemu(base, "below")
    assert dirty_by_us(Path("disk"), "b14") == granules(WRITTEN, 1 << 14)
    our_output("rebase", "-u", "-b", "", "-f", "qcow2", "disk")
    our_output("snapshot", "-c", "s", "disk")
    our_output("resize", "disk", "65M")
    assert dirty_by_us(Path("disk"), "b14") == granules(WRITTEN, 1 << 14)
    assert dirty_by_us(Path("disk"), "b14") == dirty_by_qemu(Path("disk"), "b14")
    check("disk")
    check(base)


@pytest.mark.parametrize("options", ["", "-o cluster_size=512", "-o compat=0.10"])
def test_space_of_bitmaps_is_measured_as_by_them(broken: Path, options: str) -> None:
    our_output("bitmap", "--add", "-g", "512", broken, "n" * 1000)
    for output in ("human", "json"):
        words = ["measure", f"--output={output}", "-O", "qcow2", *options.split(), broken]
        assert our_output(*words) == theirs(*words).out


def test_convert_copies_bitmaps() -> None:
    path = QemuImg.create(Path("disk"), 64 * MIB)
    written_by_us(path)
    our_output("bitmap", "--disable", path, "b14")
    our_output("convert", "--bitmaps", "-O", "qcow2", "-o", "cluster_size=4k", path, "ours")
    assert theirs("convert", "--bitmaps", "-O", "qcow2", path, "theirs").code == 0
    assert bitmaps_of("ours") == bitmaps_of("theirs") == bitmaps_of(path)
    check("ours")
    for bits in (9, 14, 20):
        assert dirty_by_qemu(Path("ours"), f"b{bits}") == granules(WRITTEN, 1 << bits)
    our_output("convert", "-O", "qcow2", path, "plain")
    assert bitmaps_of("plain") == []


CONVERT_BAD = [
    ("--bitmaps -O raw disk out", "Format driver 'raw' does not support bitmaps"),
    ("--bitmaps -f raw -O qcow2 flat out", "Source lacks bitmap support"),
    ("--bitmaps -O qcow2 -o compat=0.10 good out",
     "Format driver 'qcow2' does not support bitmaps"),
    ("--bitmaps -O qcow2 disk disk out", "Copying bitmaps only possible with single source"),
    ("--skip-broken-bitmaps -O qcow2 disk out",
     "Use of --skip-broken-bitmaps requires --bitmaps"),
    ("--bitmaps -O qcow2 disk out", "Cannot copy inconsistent bitmap 'broken'"),
    ("--bitmaps -n -O qcow2 good also",
     "Failed to create bitmap there: Bitmap already exists: there"),
]  # fmt: skip


def test_convert_refuses_what_they_refuse(broken: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(broken, "good")
    our_output("bitmap", "--remove", "good", "broken")
    shutil.copy("good", "also")
    QemuImg.create(Path("flat"), MIB, fmt="raw")
    for words, message in CONVERT_BAD:
        if "-O raw" in words:
            words = words.replace("disk", "good")
        found, wanted = ours(capfd, "convert", *words.split()), theirs("convert", *words.split())
        assert (found.code, wanted.code) == (1, 1), (words, found, wanted)
        assert message in wanted.err, (words, wanted)
        assert message in found.err, (words, found)
        Path("out").unlink(missing_ok=True)
    skip = ["--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "disk"]
    found, wanted = ours(capfd, "convert", *skip, "ours"), theirs("convert", *skip, "theirs")
    assert (found.code, wanted.code) == (0, 0)
    for outcome in (found, wanted):
        assert "Skipping inconsistent bitmap 'broken'" in outcome.err
    assert bitmaps_of("ours") == bitmaps_of("theirs")
