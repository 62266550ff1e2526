# SPDX-License-Identifier: Apache-2.0
"""The servers that take part, and how each of them is brought up for one setting.

Most stay up for a whole setting. ``qemu-storage-daemon`` with an iothread is started anew for
each measurement (see benchmarks.decoy for why).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decoy import Decoy
from benchmarks.native_programs import compiler
from benchmarks.roofline import Roofline
from benchmarks.workloads import Setting
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.nbdkit import NbdKit
from tests.peers.process import ServerFailed, ServerProcess, nbd_uri
from tests.peers.qemu import QemuStorageDaemon

OURS = "blockemu"
NBDKIT = "nbdkit"
ROOFLINE = "roofline"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server in one of its modes."""

    name: str
    program: str | None
    takes_part: Callable[[Setting], bool]
    make: Callable[[Path, Setting, Path], ServerProcess]
    fresh: bool = False

    @property
    def missing(self) -> bool:
        """Whether its program (the roofline's: a C compiler) isn't installed."""
        if self.name == ROOFLINE:
            return compiler() is None
        return self.program is not None and shutil.which(self.program) is None


def _qsd(aio: str, *, direct: bool, iothread: bool = True) -> Contestant:
    def make(image: Path, setting: Setting, socket_path: Path) -> ServerProcess:
        return QemuStorageDaemon(
            image,
            fmt=setting.fmt,
            socket_path=socket_path,
            aio=aio,
            direct=direct,
            iothread=iothread,
        )

    return Contestant(
        f"qsd-{aio}" if iothread else f"qsd-{aio}-mainloop",
        "qemu-storage-daemon",
        lambda setting: setting.direct == direct,
        make,
        fresh=iothread,
    )


def _blockemu(image: Path, setting: Setting, socket_path: Path) -> ServerProcess:
    return BlockemuDaemon(
        image,
        fmt=setting.fmt,
        socket_path=socket_path,
        export="disk",
        cache="direct" if setting.direct else None,
        aio="native" if setting.direct else None,
    )


def _nbdkit(image: Path, setting: Setting, socket_path: Path) -> ServerProcess:
    assert setting.fmt == "raw"
    return NbdKit(image, socket_path=socket_path, export="disk")


def _roofline(image: Path, setting: Setting, socket_path: Path) -> ServerProcess:
    assert setting.fmt == "raw"
    return Roofline(image, socket_path=socket_path)


def _raw_in_page_cache(setting: Setting) -> bool:
    return setting.fmt == "raw" and not setting.direct


CONTESTANTS = (
    Contestant(OURS, None, lambda setting: True, _blockemu),
    _qsd("threads", direct=False),
    _qsd("io_uring", direct=False),
    _qsd("native", direct=True),
    # nbdkit's file plugin knows neither qcow2 nor O_DIRECT.
    Contestant(NBDKIT, "nbdkit", _raw_in_page_cache, _nbdkit),
    # Not a peer but a bound: see benchmarks.roofline.
    Contestant(ROOFLINE, "a C compiler", _raw_in_page_cache, _roofline),
)

# Not part of a run unless asked for by name: the same daemon without its iothread.
EXTRA_CONTESTANTS = (
    _qsd("threads", direct=False, iothread=False),
    _qsd("io_uring", direct=False, iothread=False),
    _qsd("native", direct=True, iothread=False),
)


class Stand:
    """A contestant's place in a setting: its image, its socket, and its process."""

    def __init__(
        self, contestant: Contestant, setting: Setting, image: Path, folder: Path, size_bytes: int
    ) -> None:
        self.contestant = contestant
        self.setting = setting
        self.image = image
        self.peak_rss_kib = 0
        self._folder = folder
        self._size_bytes = size_bytes
        self._server: ServerProcess | None = None

    @contextlib.contextmanager
    def serving(self) -> Iterator[tuple[ServerProcess, str]]:
        """The running server and the URI for one fio run."""
        if self.contestant.fresh:
            yield from self._serve_once()
            return
        if self._server is None:
            socket_path = self._folder / f"{self.contestant.name}.sock"
            server = self.contestant.make(self.image, self.setting, socket_path)
            try:
                server.start()
            except ServerFailed:
                server.discard()
                raise
            self._server = server
        yield self._server, self._server.uri

    def _serve_once(self) -> Iterator[tuple[ServerProcess, str]]:
        real = self._folder / f"{self.contestant.name}.real"
        public = self._folder / f"{self.contestant.name}.sock"
        server = self.contestant.make(self.image, self.setting, real)
        try:
            server.start()
            decoy = Decoy(real=real, public=public, size_bytes=self._size_bytes)
            try:
                yield server, nbd_uri(public, server.export)
            finally:
                decoy.close()
        finally:
            server.discard()

    def take(self, image: Path) -> None:
        """Serve another image of the same content from now on."""
        if image == self.image:
            return
        self._stop()
        self.image = image

    def note_peak_rss(self, server: ServerProcess) -> None:
        """Keep the highest VmHWM; called under load: a fresh server may not outlive its client."""
        self.peak_rss_kib = max(self.peak_rss_kib, server.peak_rss_kib() or 0)

    def close(self) -> None:
        """Stop the server and remove its image."""
        self._stop()
        self.image.unlink(missing_ok=True)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.discard()
            self._server = None
