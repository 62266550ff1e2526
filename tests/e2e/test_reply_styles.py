# SPDX-License-Identifier: Apache-2.0
"""Real clients of simple and of structured replies see the same disk; those of the latter are told
of holes, and nbdcopy profits."""

from __future__ import annotations

import random
from pathlib import Path

from tests.e2e.conftest import Serve
from tests.peers.libnbd import require_libnbd
from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.peers.requirement import require_peer

KIB = 1024
MIB = 1 << 20
SIZE_BYTES = 24 * MIB


def chain(folder: Path, seed: int) -> Path:
    """An overlay on a qcow2 image on a raw file, with data, zeroes and nothing in each layer."""
    source = random.Random(f"{seed} chain")
    base = folder / "base.raw"
    base.write_bytes(source.randbytes(2 * MIB) + bytes(4 * MIB))
    below = base
    for name, fmt in (("middle", "raw"), ("top", "qcow2")):
        image = folder / f"{name}.qcow2"
        backing = ["-b", str(below), "-F", fmt]
        run_tool(["qemu-img", "create", "-q", "-f", "qcow2", *backing, image, str(SIZE_BYTES)])
        commands = []
        for _ in range(12):
            offset, length = source.randrange(0, 360) * 64 * KIB, source.randrange(1, 24) * 32 * KIB
            kind = source.choice(["-P 7", "-P 9", "-z", "-zu"])
            commands.append(f"write {kind} {offset} {min(length, SIZE_BYTES - offset)}")
        QemuIo(image, fmt="qcow2").run(*commands)
        below = image
    return below


def test_both_styles_of_replies_bring_the_same_bytes(
    tmp_path: Path, serve: Serve, seed: int
) -> None:
    nbd = require_libnbd()
    require_peer("qemu-img")
    image = chain(tmp_path, seed)
    content = tmp_path / "content.raw"
    run_tool(["qemu-img", "convert", "-O", "raw", image, content])
    expected = content.read_bytes()
    source = random.Random(f"{seed} reads")
    with serve(image, fmt="qcow2") as server:
        for structured in (False, True):
            handle = nbd.NBD()
            handle.set_request_structured_replies(structured)
            handle.connect_uri(server.uri)
            assert handle.get_structured_replies_negotiated() is structured
            assert handle.can_df() is structured
            for _ in range(150):
                length = source.choice([512, 4 * KIB, 100 * KIB, MIB, 5 * MIB])
                offset = source.randrange(0, SIZE_BYTES - length)
                assert handle.pread(length, offset) == expected[offset : offset + length]
            handle.shutdown()


def test_holes_are_told_and_df_wants_none(tmp_path: Path, serve: Serve, seed: int) -> None:
    nbd = require_libnbd()
    image = chain(tmp_path, seed)
    with serve(image, fmt="qcow2") as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        told: list[tuple[int, int, int]] = []

        def chunk(data: bytes, offset: int, status: int, error: object) -> None:
            told.append((offset, len(data), status))
            assert status == nbd.READ_DATA or not any(data)

        handle.pread_structured(SIZE_BYTES, 0, chunk)
        holes = sum(length for _, length, status in told if status == nbd.READ_HOLE)
        assert sum(length for _, length, _ in told) == SIZE_BYTES
        assert holes > MIB
        told.clear()
        handle.pread_structured(SIZE_BYTES, 0, chunk, nbd.CMD_FLAG_DF)
        assert told == [(0, SIZE_BYTES, nbd.READ_DATA)]
        handle.shutdown()


def test_nbdcopy_without_extents_copies_a_sparse_chain(
    tmp_path: Path, serve: Serve, seed: int
) -> None:
    """Then it is our READs that tell it what is a hole."""
    require_peer("nbdcopy")
    image = chain(tmp_path, seed)
    target = tmp_path / "copy.raw"
    target.write_bytes(bytes(SIZE_BYTES))
    with serve(image, fmt="qcow2") as server:
        run_tool(["nbdcopy", "--no-extents", server.uri, target])
    QemuImg.compare(image, target, one_fmt="qcow2")
