# SPDX-License-Identifier: Apache-2.0
"""The ways in which clients come to an export, said as each client wants them said."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.peers.blockemu import BlockemuDaemon, BlockemuTcpDaemon
from tests.peers.process import ServerProcess

DOORS = ("unix", "tcp")


@dataclass(frozen=True, slots=True)
class Door:
    """A server that runs, and where."""

    server: ServerProcess
    address: str
    """As QEMU's --image-opts has it."""
    qemu_objects: tuple[str, ...] = ()
    """What QEMU's tools want to be told besides: arguments."""

    def uri(self, export: str) -> str:
        """For libnbd's tools and fio."""
        return self.server.export_uri(export)

    def image_opts(self, export: str) -> str:
        """For QEMU's tools."""
        return f"driver=nbd,export={export},{self.address}"


@contextmanager
def open_door(kind: str, images: Mapping[str, Path], *, fmt: str) -> Iterator[Door]:
    """A daemon that serves `images` by their names as exports."""
    (export, image), *others = images.items()
    more = [word for name, other in others for word in (str(other), "--name", name)]
    if kind == "unix":
        with (
            tempfile.TemporaryDirectory(prefix="bemu-") as folder,
            BlockemuDaemon(
                image, fmt=fmt, export=export, socket_path=Path(folder, "nbd.sock"), extra=more
            ) as server,
        ):
            yield Door(server, f"server.type=unix,server.path={server.socket_path}")
    else:
        with BlockemuTcpDaemon(image, fmt=fmt, export=export, extra=more) as tcp:
            yield Door(tcp, f"server.type=inet,server.host=127.0.0.1,server.port={tcp.port}")
