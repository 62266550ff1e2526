# SPDX-License-Identifier: Apache-2.0
"""What clients see of holes, layers and dirty bitmaps is what qemu-nbd shows of the same image.

nbdinfo and qemu-img map both servers' exports; neighbours that are alike are merged first, since
how long one answer is, is the server's own business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_hostile_clients import ask
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.nbd_tools import NbdCopy, NbdInfo
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuImg, QemuIo, QemuNbd, run_tool
from tests.peers.requirement import require_peer

KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB
BITMAP = "b0"


@pytest.fixture(autouse=True)
def _peers(only_ours: None) -> None:
    for peer in ("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy"):
        require_peer(peer)


# --- the zoo ---


def _raw(folder: Path) -> Path:
    image = QemuImg.create(folder / "disk.raw", SIZE + 512, fmt="raw")
    writes = ("write -P 1 1M 64k", "write -P 2 3M 1M", "write -P 3 16M 512")
    QemuIo(image, fmt="raw").run(*writes)
    return image


def _qcow2(folder: Path, **options: str | int) -> Path:
    image = QemuImg.create(folder / "disk.qcow2", SIZE + 512, options=options or None)
    QemuIo(image, fmt="qcow2").run(
        "write -P 1 0 64k", "write -P 1 200k 300k", "write -z 1M 128k", "write -zu 2M 192k",
        "write -P 4 2M 4k", "write -c -P 5 4M 64k", "discard 0 64k", "write -P 6 16M 512",
    )  # fmt: skip
    return image


def _fragmented(folder: Path) -> Path:
    image = QemuImg.create(folder / "disk.qcow2", SIZE, options={"cluster_size": 4096})
    QemuIo(image, fmt="qcow2").run(*(f"write -P 7 {i * 8}k 4k" for i in range(0, 900, 3)))
    return image


def _chain(folder: Path) -> Path:
    """Base raw and short, a middle one that is shorter than the top, zeroes that hide data."""
    base = QemuImg.create(folder / "base.raw", 6 * MIB, fmt="raw")
    QemuIo(base, fmt="raw").run("write -P 1 0 3M", "write -P 1 5M 512k")
    middle = QemuImg.create(folder / "middle.qcow2", 9 * MIB, backing=base, backing_fmt="raw")
    QemuIo(middle, fmt="qcow2").run("write -P 2 1M 256k", "write -z 2M 256k", "write -P 2 8M 64k")
    top = QemuImg.create(folder / "top.qcow2", SIZE, backing=middle, backing_fmt="qcow2")
    QemuIo(top, fmt="qcow2").run(
        *(f"write -P 3 {i * 192}k 64k" for i in range(20)),
        "write -z 1536k 64k",
        "write -P 3 15M 1M",
    )
    return top


def _snapshot(folder: Path) -> Path:
    image = _qcow2(folder)
    run_tool(["qemu-img", "snapshot", "-c", "one", image])
    QemuIo(image, fmt="qcow2").run("write -P 9 0 32k", "discard 256k 64k")
    return image


def _preallocated(folder: Path) -> Path:
    image = QemuImg.create(folder / "disk.qcow2", SIZE, options={"preallocation": "metadata"})
    QemuIo(image, fmt="qcow2").run("write -P 9 1M 96k", "write -P 9 7M 4k", "write -z 3M 64k")
    return image


def _data_file(folder: Path) -> Path:
    options: dict[str, str | int] = {"data_file": str(folder / "disk.data")}
    image = QemuImg.create(folder / "disk.qcow2", SIZE, options=options)
    QemuIo(image, fmt="qcow2").run("write -P 1 0 64k", "write -z 1M 128k", "write -P 1 9M 4k")
    return image


def _subclusters(folder: Path) -> Path:
    image = QemuImg.create(folder / "disk.qcow2", SIZE, options={"extended_l2": "on"})
    QemuIo(image, fmt="qcow2").run(
        *(f"write -P 3 {i * 20}k 2k" for i in range(100)), "write -z 4M 6k", "write -c -P 5 6M 64k"
    )
    return image


ZOO: dict[str, tuple[Callable[[Path], Path], str]] = {
    "raw": (_raw, "raw"),
    "qcow2": (_qcow2, "qcow2"),
    "version-2": (lambda folder: _qcow2(folder, compat="0.10"), "qcow2"),
    "fragmented": (_fragmented, "qcow2"),
    "chain": (_chain, "qcow2"),
    "snapshot": (_snapshot, "qcow2"),
    "preallocated": (_preallocated, "qcow2"),
    "data-file": (_data_file, "qcow2"),
    "subclusters": (_subclusters, "qcow2"),
}


@dataclass
class Pair:
    """Ours and qemu-nbd on one image, read-only."""

    ours: ServerProcess
    theirs: ServerProcess


def pair(image: Path, fmt: str, folder: Path, *, bitmaps: Iterable[str] = ()) -> Pair:
    """Both servers, to be used with `with` each."""
    extra = [word for name in bitmaps for word in ("--bitmap", name)]
    ours = BlockemuDaemon(
        image, fmt=fmt, socket_path=folder / "o.sock", export="disk", read_only=True,
        extra=["-A", *extra],
    )  # fmt: skip
    theirs = QemuNbd(
        image, fmt=fmt, socket_path=folder / "q.sock", export="disk", read_only=True,
        bitmaps=bitmaps, allocation_depth=True,
    )  # fmt: skip
    return Pair(ours, theirs)


def image_map(uri: str, context: str | None = None) -> list[dict[str, Any]]:
    """qemu-img's map of an export, neighbours as one; `context` to see it in base:allocation's
    place."""
    target = uri
    if context is not None:
        options = {"driver": "nbd", "x-dirty-bitmap": context, "export": "disk"}
        path = uri.partition("?socket=")[2]
        options["server"] = {"type": "unix", "path": path}  # type: ignore[assignment]
        target = "json:" + json.dumps(options)
    merged: list[dict[str, Any]] = []
    for entry in QemuImg.map(target):
        last = merged[-1] if merged else None
        alike = {"start", "length", "offset"}
        if last is not None and all(last[key] == entry[key] for key in entry.keys() - alike):
            last["length"] += entry["length"]
        else:
            merged.append(entry)
    return merged


@pytest.mark.parametrize("name", ZOO)
def test_maps_are_those_of_qemu_nbd(name: str, tmp_path: Path, run_dir: Path) -> None:
    make, fmt = ZOO[name]
    both = pair(make(tmp_path), fmt, run_dir)
    with both.ours as ours, both.theirs as theirs:
        for context in ("base:allocation", "qemu:allocation-depth"):
            expected = NbdInfo.map(theirs.uri, context)
            assert len(expected) > 1 or context != "base:allocation"
            assert NbdInfo.map(ours.uri, context) == expected, context
        assert image_map(ours.uri) == image_map(theirs.uri)


def test_a_bitmap_of_the_base_is_that_of_qemu_nbd(tmp_path: Path, run_dir: Path) -> None:
    base = QemuImg.create(tmp_path / "base.qcow2", 5 * MIB + 512)
    run_tool(["qemu-img", "bitmap", "--add", "-g", "32k", base, BITMAP])
    QemuIo(base, fmt="qcow2").run("write 32k 1k", "write 1M 100k", "write 5M 512")
    run_tool(["qemu-img", "bitmap", "--add", base, "other"])
    top = QemuImg.create(tmp_path / "top.qcow2", SIZE, backing=base, backing_fmt="qcow2")
    both = pair(top, "qcow2", run_dir, bitmaps=(BITMAP, "other"))
    with both.ours as ours, both.theirs as theirs:
        assert set(NbdInfo.contexts(ours.uri)) == set(NbdInfo.contexts(theirs.uri))
        for bitmap in (BITMAP, "other"):
            context = f"qemu:dirty-bitmap:{bitmap}"
            assert NbdInfo.map(ours.uri, context) == NbdInfo.map(theirs.uri, context)
        assert NbdInfo.dirty_ranges(ours.uri, BITMAP) == [
            (32 * KIB, 32 * KIB), (MIB, 128 * KIB), (5 * MIB, 512),
        ]  # fmt: skip
        context = f"qemu:dirty-bitmap:{BITMAP}"
        assert image_map(ours.uri, context) == image_map(theirs.uri, context)


def test_an_incremental_backup_over_nbd_restores_the_disk(tmp_path: Path, run_dir: Path) -> None:
    """The full copy, writes that a bitmap records, then only what it calls dirty."""
    disk = _qcow2(tmp_path)
    backup = tmp_path / "backup.raw"
    QemuImg.convert(disk, backup, source_fmt="qcow2", target_fmt="raw")
    run_tool(["qemu-img", "bitmap", "--add", disk, BITMAP])
    with BlockemuDaemon(
        disk, fmt="qcow2", socket_path=run_dir / "o.sock", export="disk", extra=["--bitmap", BITMAP]
    ) as server:
        QemuIo(server.uri).run("write -P 21 100k 70k", "write -z 2M 64k", "write -P 22 9M 1M")
        dirty = NbdInfo.dirty_ranges(server.uri, BITMAP)
        copied = 0
        with backup.open("r+b") as target:
            for offset, length in dirty:
                part = tmp_path / "part"
                run_tool([
                    "qemu-img", "dd", "-f", "raw", "-O", "raw", "bs=512", f"skip={offset // 512}",
                    f"count={(offset + length) // 512}", f"if={server.uri}", f"of={part}",
                ])  # fmt: skip
                target.seek(offset)
                target.write(part.read_bytes()[:length])
                copied += length
        assert 1 * MIB < copied < 2 * MIB
        QemuImg.compare(server.uri, backup)
    QemuImg.compare(disk, backup, one_fmt="qcow2")


@pytest.mark.parametrize("name", ["raw", "qcow2", "chain"])
def test_copies_skip_holes(name: str, tmp_path: Path, run_dir: Path) -> None:
    """nbdcopy and qemu-img ask where there is data, and read little else."""
    make, fmt = ZOO[name]
    image = make(tmp_path)
    data = sum(entry["length"] for entry in QemuImg.map(image, fmt=fmt) if entry["data"])
    copies = tmp_path / "copy.raw", tmp_path / "converted.raw"
    control = run_dir / "control"
    with BlockemuDaemon(
        image, fmt=fmt, socket_path=run_dir / "o.sock", export="disk", read_only=True,
        extra=["--control", str(control)],
    ) as server:  # fmt: skip
        copies[0].touch()
        NbdCopy.copy(server.uri, copies[0])
        QemuImg.convert(server.uri, copies[1], source_fmt="raw", target_fmt="raw")
        (export,) = ask(control, "x-query-export-stats")
    (read,) = (one["bytes"] for one in export["operations"] if one["operation"] == "read")
    assert data <= read <= 2 * data + MIB, "two copies, and a little where data begins and ends"
    for copy in copies:
        QemuImg.compare(image, copy, one_fmt=fmt)
        assert copy.stat().st_blocks * 512 < SIZE // 2
