# SPDX-License-Identifier: Apache-2.0
"""The ways in which clients come to an export, said as each client wants them said."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.peers.blockemu import BlockemuDaemon, BlockemuTcpDaemon
from tests.peers.certificates import tls_object
from tests.peers.process import ServerProcess


@dataclass(frozen=True, slots=True)
class Door:
    """A server that runs, and where."""

    server: ServerProcess
    address: str
    """As QEMU's --image-opts has it."""
    credentials: Path | None = None
    """A folder with the client's certificate, where the server wants TLS."""

    @property
    def qemu_objects(self) -> tuple[str, ...]:
        """What QEMU's tools want to be told besides: arguments."""
        if self.credentials is None:
            return ()
        return ("--object", tls_object(self.credentials, "client"))

    def uri(self, export: str) -> str:
        """For libnbd and its tools."""
        uri = self.plain_uri(export)
        if self.credentials is not None:
            uri += f"?tls-certificates={quote(str(self.credentials))}"
        return uri

    def plain_uri(self, export: str) -> str:
        """For fio and nbdfuse, which take no names of files in it: see `home_with`."""
        uri = self.server.export_uri(export)
        if self.credentials is not None:
            uri = uri.replace("nbd://127.0.0.1:", "nbds://localhost:")
        return uri

    def image_opts(self, export: str) -> str:
        """For QEMU's tools."""
        tls = "" if self.credentials is None else ",tls-creds=tls0,tls-hostname=localhost"
        return f"driver=nbd,export={export},{self.address}{tls}"


@contextmanager
def open_door(
    kind: str, images: Mapping[str, Path], *, fmt: str, credentials: Path
) -> Iterator[Door]:
    """A daemon that serves `images` by their names as exports.

    `credentials`: a folder with the server's certificates and the client's, for the door "tls"; the
    server lets nobody in without.
    """
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
        secure = kind == "tls"
        if secure:
            more += ["--object", tls_object(credentials, "server"), "--tls-creds", "tls0"]
        with BlockemuTcpDaemon(image, fmt=fmt, export=export, extra=more) as tcp:
            address = f"server.type=inet,server.host=127.0.0.1,server.port={tcp.port}"
            yield Door(tcp, address, credentials if secure else None)
