# SPDX-License-Identifier: Apache-2.0
"""The daemon with its C parts under sanitizers (`tools/sanitized-build`), serving real clients.

The fuzzer drives the same C code harder, but plays Python's part itself. Here Python plays it: the
map is filled and emptied by real images, faults go through the block graph, memory is shared
between both. What the clients read is verified (verified_load.py, and fio with its checksums).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.disk_model import DiskModel, divide
from tests.e2e.verified_load import VerifiedClient, VerifiedLoad
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.fio import Fio
from tests.peers.qemu import QemuImg, QemuIo
from tests.peers.requirement import require_peer

HOUSE = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    os.environ.get("BLOCKEMU_NATIVE") == "0", reason="is about the C data path"
)

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
KIB, MIB = 1 << 10, 1 << 20
SIZE_BYTES = 8 * MIB + 512
CLIENTS, DEPTH = 3, 24
REPLIES = 15_000 * ROUNDS
REPORTS = re.compile(r"ERROR: AddressSanitizer|runtime error:|Assertion .* failed")
# A frame of a leak's stack that is ours.
OUR_C = re.compile(r"_(transmission|poll|direct_map|libaio)\b.*\.(c|h|so)\b|loop/native|nbd/native")

# How the host file is served (ARCHITECTURE.md, "The data path"): on the spot in a memory
# filesystem, by the page cache, or by Linux AIO.
SERVED = [
    ("raw", "writeback", "memory"),
    ("raw", "writeback", "disk"),
    ("raw", "direct", "disk"),
    ("qcow2", "writeback", "memory"),
    ("qcow2", "direct", "disk"),
]


@pytest.fixture
def socket_path() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bemu-"))  # short, as a socket's path must be
    yield folder / "nbd.sock"
    shutil.rmtree(folder)


def make_image(image: Path, fmt: str, rng: random.Random) -> bytes:
    """An image, half of whose clusters are there; and what it holds."""
    content = bytearray(SIZE_BYTES)
    if fmt == "raw":
        content[:] = rng.randbytes(SIZE_BYTES)
        image.write_bytes(content)
        return bytes(content)
    QemuImg.create(image, SIZE_BYTES, options={"cluster_size": 16 * KIB})
    commands = []
    for number, offset in enumerate(range(0, 8 * MIB, 512 * KIB)):
        commands.append(f"write -P {number + 1} {offset} {256 * KIB}")
        content[offset : offset + 256 * KIB] = bytes([number + 1]) * (256 * KIB)
    QemuIo(image, fmt="qcow2").run(*commands)
    return bytes(content)


def load(path: Path, model: DiskModel, rng: random.Random) -> None:
    """Several clients with many requests each, until enough is answered."""
    answered = 0

    def count(replies: int) -> None:
        nonlocal answered
        answered += replies

    clients = [
        VerifiedClient(f"client{n}", path, "disk", model=model, lots=lots, depth=DEPTH, rng=rng)
        for n, lots in enumerate(divide(SIZE_BYTES, CLIENTS, rng))
    ]
    near, far = socket.socketpair()
    with near, far:
        enough = lambda: answered >= REPLIES  # noqa: E731
        VerifiedLoad(clients, rng=rng, enough=enough, on_replies=count).run(near)


def check_reports(stderr: str) -> None:
    """Nothing was found. What an interpreter keeps for ever doesn't count as a leak; ours does."""
    assert not REPORTS.search(stderr), stderr
    leaks = re.findall(r"(?:Direct|Indirect) leak of .*?(?=\n\n|\Z)", stderr, re.DOTALL)
    ours = [leak for leak in leaks if OUR_C.search(leak)]
    assert not ours, "\n\n".join(ours)


@pytest.mark.slow
@pytest.mark.timeout(180 * ROUNDS)
@pytest.mark.parametrize(
    ("fmt", "cache", "folder"),
    [pytest.param(f, c, (w, c), id=f"{f}-{c}-{w}") for f, c, w in SERVED],
    indirect=["folder"],
)
def test_daemon_serves_without_a_sanitizers_report(
    environment: dict[str, str],
    socket_path: Path,
    seed: int,
    fmt: str,
    cache: str,
    folder: Path,
) -> None:
    for peer in ("qemu-img", "qemu-io", "fio"):
        require_peer(peer)
    chosen = int(os.environ.get("BLOCKEMU_SEED", seed))
    print(f"seed {chosen}: replay with BLOCKEMU_SEED={chosen}")
    rng = random.Random(f"{chosen}-{fmt}-{cache}")
    image = folder / f"image.{fmt}"
    model = DiskModel(make_image(image, fmt, rng), rng)
    server = BlockemuDaemon(image, fmt=fmt, socket_path=socket_path, export="disk", cache=cache)
    server.environment.update(environment)
    with server:
        load(socket_path, model, rng)
        model.check(0, read_all(server.uri, folder))
        Fio(server.uri).verify(size_bytes=4 * MIB, seed=rng.randrange(1 << 31))
    print(server.stderr)
    check_reports(server.stderr)
    if fmt == "qcow2":
        found = QemuImg.check(image)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text


def read_all(uri: str, folder: Path) -> bytes:
    """The export's content, by qemu-img."""
    copy = folder / "copy.raw"
    QemuImg.convert(uri, copy, source_fmt="raw", target_fmt="raw")
    return copy.read_bytes()


def test_sanitized_build_is_what_tests_and_daemons_import(
    environment: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "test_where.py"
    script.write_text(
        "from blockemu.nbd import _transmission\nfrom blockemu.loop import _poll\n"
        f"FOLDER = {environment['PYTHONPATH']!r}\n"
        "def test_where(): check()\n"
        "def check(): assert all(m.__file__.startswith(FOLDER) for m in (_transmission, _poll))\n"
        "check()\n"
    )
    pytest_words = ["-m", "pytest", "-q", "-c", "pyproject.toml", "-p", "no:cacheprovider"]
    for words in ([], pytest_words):
        result = subprocess.run(
            [sys.executable, *words, script],
            cwd=HOUSE,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_leaks_of_ours_are_told_from_an_interpreters() -> None:
    """A report that nobody recognised would pass for none."""
    check_reports("Direct leak of 1 byte(s)\n    #0 malloc\n    #1 gc_alloc Modules/gc.c:1\n\n")
    with pytest.raises(AssertionError):
        check_reports("Direct leak of 9 byte(s)\n    #0 calloc\n    #1 open build/_poll.c:9")
    with pytest.raises(AssertionError):
        check_reports("x.c:3:5: runtime error: shift exponent 64 is too large")
