# SPDX-License-Identifier: Apache-2.0
"""Random operations through a served qcow2 image and through a plain model in memory: both have to
agree.

The model is a bytearray. The operations go over NBD by libnbd, alone and many at once, at any
alignment; the daemon is restarted in between. At the end qemu-img has the last word: ``check`` on
the image, and ``compare`` with the model. Trimmed bytes are the one thing that NBD leaves open:
each may read as before or as zero, and the model learns which.

``BLOCKEMU_SEED`` replays a run, ``BLOCKEMU_ROUNDS`` asks for more of them (`make
fuzz-differential`)."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.peers.libnbd import require_libnbd
from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.peers.requirement import require_peer

KIB, MIB = 1 << 10, 1 << 20
ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
RESTARTS = 3
BATCHES = 30
BATCH_OPERATIONS_MAX = 12
SNAPSHOT = "before"


@dataclass(frozen=True)
class Variant:
    """One kind of image."""

    size_bytes: int
    cluster_bytes: int
    options: dict[str, str | int] = field(default_factory=dict)
    # Format and length of each image below, from the one directly below down to the base.
    backing: tuple[tuple[str, int], ...] = ()
    cache: str = "writeback"
    # How the image is filled before it is served: by qemu-img with compressed clusters, or by
    # writes and then an internal snapshot, which leaves every cluster with two owners.
    compressed: bool = False
    snapshot: bool = False


VARIANTS = {
    "64k": Variant(8 * MIB, 64 * KIB),
    "64k-direct": Variant(8 * MIB + 512, 64 * KIB, cache="direct"),
    "512": Variant(2 * MIB + 512, 512),
    "4k-direct": Variant(6 * MIB - 512, 4 * KIB, cache="direct"),
    "2m": Variant(16 * MIB + 1536, 2 * MIB),
    "version-2": Variant(4 * MIB, 16 * KIB, {"compat": "0.10"}),
    "refcounts-1-bit": Variant(4 * MIB, 1 * KIB, {"refcount_bits": 1}),
    "refcounts-64-bit": Variant(4 * MIB, 1 * KIB, {"refcount_bits": 64}),
    "lazy-refcounts": Variant(4 * MIB, 4 * KIB, {"lazy_refcounts": "on"}),
    "preallocated": Variant(4 * MIB, 32 * KIB, {"preallocation": "metadata"}),
    "compressed": Variant(4 * MIB, 64 * KIB, compressed=True),
    "snapshot": Variant(4 * MIB, 64 * KIB, snapshot=True),
    "snapshot-small-clusters-direct": Variant(3 * MIB, 2 * KIB, snapshot=True, cache="direct"),
    "subclusters": Variant(8 * MIB + 512, 64 * KIB, {"extended_l2": "on"}),
    "subclusters-direct": Variant(6 * MIB, 16 * KIB, {"extended_l2": "on"}, cache="direct"),
    "subclusters-snapshot": Variant(4 * MIB, 32 * KIB, {"extended_l2": "on"}, snapshot=True),
    "subclusters-compressed": Variant(4 * MIB, 64 * KIB, {"extended_l2": "on"}, compressed=True),
    "subclusters-with-base": Variant(
        6 * MIB, 128 * KIB, {"extended_l2": "on"}, backing=(("qcow2", 5 * MIB + 512),)
    ),
    "raw-base": Variant(6 * MIB, 64 * KIB, backing=(("raw", 6 * MIB),)),
    "short-raw-base": Variant(6 * MIB, 16 * KIB, backing=(("raw", 3 * MIB + 777),)),
    "long-qcow2-base-direct": Variant(
        5 * MIB, 4 * KIB, backing=(("qcow2", 9 * MIB),), cache="direct"
    ),
    "chain-of-three": Variant(
        6 * MIB, 8 * KIB, backing=(("qcow2", 5 * MIB), ("qcow2", 4 * MIB + 512), ("raw", 5 * MIB))
    ),
    "version-2-with-base": Variant(
        4 * MIB, 16 * KIB, {"compat": "0.10"}, backing=(("qcow2", 3 * MIB),)
    ),
    "data-file-with-base": Variant(
        4 * MIB + 512, 4 * KIB, {"data_file": "top.data"}, backing=(("raw", 3 * MIB),)
    ),
    "raw-data-file-direct": Variant(
        4 * MIB + 512, 64 * KIB, {"data_file": "top.data", "data_file_raw": "on"}, cache="direct"
    ),
    "subclusters-in-a-data-file": Variant(
        4 * MIB + 512,
        16 * KIB,
        {"data_file": "top.data", "extended_l2": "on"},
        backing=(("raw", 3 * MIB),),
    ),
}


def scribble(image: Path, content: bytearray, rng: random.Random) -> None:
    """Some writes of data and of zeroes by qemu-io."""
    commands = []
    for value in range(1, 9):
        offset = rng.randrange(len(content))
        count = min(rng.randrange(1, 300_000), len(content) - offset)
        zero = rng.random() < 0.3
        commands.append(f"write {'-z' if zero else f'-P {value}'} {offset} {count}")
        content[offset : offset + count] = bytes([0 if zero else value]) * count
    QemuIo(image, fmt="qcow2").run(*commands)


def make_chain(folder: Path, variant: Variant, rng: random.Random) -> tuple[Path, bytearray]:
    """The images of a variant, and what the topmost one holds."""
    below: tuple[Path, str] | None = None
    content = bytearray()
    for depth, (fmt, length) in reversed(list(enumerate(variant.backing))):
        image = folder / f"base{depth}.{fmt}"
        content = content[:length].ljust(length, b"\0")
        if fmt == "raw":
            content = bytearray(rng.randbytes(length))
            image.write_bytes(content)
        else:
            base, base_fmt = below or (None, None)
            QemuImg.create(image, length, backing=base, backing_fmt=base_fmt)
            scribble(image, content, rng)
        below = image, fmt
    top = folder / "top.qcow2"
    options = {"cluster_size": variant.cluster_bytes, **variant.options}
    if "data_file" in options:
        options["data_file"] = str(folder / options["data_file"])
    base, base_fmt = below or (None, None)
    QemuImg.create(top, variant.size_bytes, options=options, backing=base, backing_fmt=base_fmt)
    content = content[: variant.size_bytes].ljust(variant.size_bytes, b"\0")
    if variant.compressed:
        source = folder / "source.qcow2"
        QemuImg.create(source, variant.size_bytes)
        scribble(source, content, rng)
        run_tool(["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", source, top])
    if variant.snapshot:
        scribble(top, content, rng)
        run_tool(["qemu-img", "snapshot", "-c", SNAPSHOT, top])
    return top, content


class Driver:
    """Feeds operations to the export and to the model."""

    def __init__(self, nbd: Any, model: bytearray, variant: Variant, rng: random.Random) -> None:
        self._nbd = nbd
        self._model = model
        self._variant = variant
        self._rng = rng
        self._handle: Any = None

    def connect(self, uri: str) -> None:
        """Talk to this server from now on."""
        self._handle = self._nbd.NBD()
        self._handle.connect_uri(uri)
        assert self._handle.get_size() == len(self._model)

    def disconnect(self) -> None:
        """Before the server stops."""
        self._handle.shutdown()

    def _extent(self) -> tuple[int, int]:
        """Offset and length: often at, around or across cluster borders."""
        rng, cluster = self._rng, self._variant.cluster_bytes
        size = len(self._model)
        offset = rng.randrange(size)
        shape = rng.random()
        if shape < 0.4:
            offset = offset // cluster * cluster
        elif shape < 0.6:
            offset = max(0, offset // cluster * cluster + rng.randint(-3, 3))
        length = rng.choice(
            [
                rng.randint(1, 4096),
                cluster,
                cluster + rng.randint(-3, 3),
                rng.randint(1, 4) * cluster,
                rng.randint(1, 400_000),
            ]
        )
        return offset, max(1, min(length, size - offset, 4 * MIB))

    def batch(self) -> None:
        """Some operations at once, on extents that don't meet; then all of it is compared."""
        pending: list[tuple[int, Any]] = []
        taken: list[tuple[int, int]] = []
        trimmed: list[tuple[int, int]] = []
        for _ in range(self._rng.randint(1, BATCH_OPERATIONS_MAX)):
            offset, length = self._extent()
            if any(offset < start + count and start < offset + length for start, count in taken):
                continue
            taken.append((offset, length))
            pending.append(self._start(offset, length, trimmed))
        while self._handle.aio_in_flight() > 0:
            self._handle.poll(-1)
        for cookie, _buffer in pending:
            assert self._handle.aio_command_completed(cookie)
        for offset, length in trimmed:
            self._learn_trimmed(offset, length)
        for offset, length in taken:
            self._compare(max(0, offset - 600), min(len(self._model), offset + length + 600))

    def _start(self, offset: int, length: int, trimmed: list[tuple[int, int]]) -> tuple[int, Any]:
        rng, handle, nbd = self._rng, self._handle, self._nbd
        flags = nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0
        kind = rng.random()
        if kind < 0.5:
            data = bytearray(rng.randbytes(length) if rng.random() < 0.8 else bytes(length))
            self._model[offset : offset + length] = data
            buffer = nbd.Buffer.from_bytearray(data)
            return handle.aio_pwrite(buffer, offset, flags=flags), buffer
        if kind < 0.7:
            self._model[offset : offset + length] = bytes(length)
            if rng.random() < 0.5:
                flags |= nbd.CMD_FLAG_NO_HOLE
            return handle.aio_zero(length, offset, flags=flags), None
        if kind < 0.85:
            trimmed.append((offset, length))
            return handle.aio_trim(length, offset, flags=flags), None
        if kind < 0.9:
            return handle.aio_flush(), None
        buffer = nbd.Buffer(length)
        return handle.aio_pread(buffer, offset), buffer

    def _learn_trimmed(self, offset: int, length: int) -> None:
        """Each byte of a trimmed extent reads as it did or as zero, and keeps doing so."""
        found = self._handle.pread(length, offset)
        before = self._model[offset : offset + length]
        if found != before:
            wrong = [
                at
                for at, (new, old) in enumerate(zip(found, before, strict=True))
                if new not in (0, old)
            ]
            assert not wrong, f"trim of {length} at {offset} invented data at {offset + wrong[0]}"
            self._model[offset : offset + length] = found

    def _compare(self, start: int, end: int) -> None:
        for offset in range(start, end, 4 * MIB):
            length = min(4 * MIB, end - offset)
            found = self._handle.pread(length, offset)
            wanted = self._model[offset : offset + length]
            if found != wanted:
                at = next(i for i in range(length) if found[i] != wanted[i])
                pytest.fail(f"byte {offset + at} is {found[at]:#x}, expected {wanted[at]:#x}")

    def compare_all(self) -> None:
        """The whole export against the model."""
        self._compare(0, len(self._model))


@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("name", VARIANTS)
def test_qcow2_agrees_with_a_plain_model(
    direct_dir: Path, serve: Serve, random_seed: int, name: str, turn: int
) -> None:
    require_peer("qemu-img")
    require_peer("qemu-io")
    variant = VARIANTS[name]
    rng = random.Random(f"{random_seed}-{name}-{turn}")
    image, model = make_chain(direct_dir, variant, rng)
    before = bytes(model)
    driver = Driver(require_libnbd(), model, variant, rng)
    for _ in range(RESTARTS):
        with serve(image, fmt="qcow2", cache=variant.cache) as server:
            driver.connect(server.uri)
            for _ in range(BATCHES):
                driver.batch()
            driver.compare_all()
            driver.disconnect()
        found = QemuImg.check(image)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    reference = direct_dir / "model.raw"
    reference.write_bytes(model)
    QemuImg.compare(image, reference, one_fmt="qcow2")
    if variant.snapshot:
        reference.write_bytes(before)
        run_tool(["qemu-img", "snapshot", "-a", SNAPSHOT, image])
        QemuImg.compare(image, reference, one_fmt="qcow2")
