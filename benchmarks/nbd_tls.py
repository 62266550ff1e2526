# SPDX-License-Identifier: Apache-2.0
"""One client that reads all of an image through TLS, in requests of 1 MiB, as fast as it gets it.

nbdcopy, with certificates on both sides, from an image in the page cache. Client and server are
busy with their ciphers for the most part, on a core each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from benchmarks.contestants import OURS
from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.measure import rotated
from benchmarks.nbd_clients import QEMU_NBD
from benchmarks.nbd_sample import Sample
from benchmarks.workloads import MIB
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.certificates import make_pki
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuNbd, run_tool

TLS = "read-1m TLS"
IMAGE_BYTES = 1024 * MIB
CLIENT = ["nbdcopy", "--connections=1", "--threads=1", "--requests=4", f"--request-size={MIB}"]


def measure_tls(folder: Path, *, rounds: int) -> Iterator[Sample]:
    """MB/s, and CPU time of the server per MiB. Raises: ServerFailed, ToolFailed."""
    pki = make_pki(folder)
    image, path = folder / "tls.raw", folder / "tls.sock"
    block = bytes(range(256)) * (MIB // 256)
    with image.open("wb") as file:
        for _ in range(IMAGE_BYTES // MIB):
            file.write(block)
    tls = ["--object", f"tls-creds-x509,id=tls0,dir={pki.folder},endpoint=server"]
    tls += ["--tls-creds", "tls0"]

    def ours() -> ServerProcess:
        return BlockemuDaemon(image, fmt="raw", socket_path=path, export="disk", extra=tls)

    def theirs() -> ServerProcess:
        server = QemuNbd(image, fmt="raw", socket_path=path, export="disk")
        server.command[1:1] = tls
        return server

    uri = f"nbds+unix:///disk?socket={quote(str(path))}&tls-certificates={quote(str(pki.folder))}"
    for turn in range(rounds):
        for name, make in rotated([(OURS, ours), (QEMU_NBD, theirs)], turn):
            with make() as server:
                began, cpu_ns = time.monotonic(), process_cpu_ns(server.pid)
                run_tool([*CLIENT, uri, "null:"])
                took_s = time.monotonic() - began
                cpu_ns = process_cpu_ns(server.pid) - cpu_ns
            yield Sample(TLS, name, "MB/s", turn, IMAGE_BYTES / 1e6 / took_s)
            yield Sample(f"{TLS} CPU", name, "us/MiB", turn, cpu_ns / 1000 / (IMAGE_BYTES / MIB))
    image.unlink()
