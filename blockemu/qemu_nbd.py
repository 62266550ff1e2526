# SPDX-License-Identifier: Apache-2.0
"""What qemu-nbd does, by a daemon of ours: one image, one export, for one client unless more are
let in, until the last has left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from blockemu.addresses import Address
from blockemu.config import DaemonConfig, serve_config
from blockemu.daemon import Daemon
from blockemu.drivers.crypto.user_objects import UserObjects
from blockemu.errors import DaemonError
from blockemu.limits import Limits
from blockemu.loop.background import PidFile, go_to_background
from blockemu.nbd.tls import TlsPolicy
from blockemu.notify import make_notify
from blockemu.temporary_overlay import temporary_overlay

DIRECT = frozenset({"none", "directsync"})
WRITE_THROUGH = frozenset({"writethrough", "directsync"})
"""Cache modes that go past the host's cache; those in which each write reaches the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdRequest:
    """A command line. `shared`: clients at once, 0 for as many as a daemon takes; `temporary`:
    writes go to an overlay that is thrown away."""

    image: str
    addresses: tuple[Address, ...]
    fmt: str | None = None
    export_name: str = ""
    description: str = ""
    shared: int = 1
    persistent: bool = False
    offset: int = 0
    read_only: bool = False
    snapshot: str | None = None
    temporary: bool = False
    cache: str = "writeback"
    aio: str = "native"
    discard: str = "ignore"
    detect_zeroes: str = "off"
    bitmaps: tuple[str, ...] = ()
    allocation_depth: bool = False
    objects: UserObjects = field(default_factory=UserObjects)
    tls: TlsPolicy | None = None


def config_of(request: NbdRequest, *, overlay: str | None = None) -> DaemonConfig:
    """The daemon for it. `overlay`: what is opened instead of the image. Raises: DaemonError."""
    config = serve_config(
        [request.image if overlay is None else overlay],
        names=[request.export_name],
        descriptions=[request.description],
        fmt=request.fmt if overlay is None else "qcow2",
        read_only=request.read_only,
        snapshot=request.snapshot,
        direct=request.cache in DIRECT,
        aio=request.aio,
        discard=request.discard,
        detect_zeroes=request.detect_zeroes,
        rotational=False,  # qemu-nbd never says so
        address=request.addresses,
        limits=Limits(connections_max=request.shared) if request.shared else Limits(),
        objects=request.objects,
        tls=request.tls,
    )
    (image,) = config.images
    export = replace(
        image.export,
        # As qemu-nbd: where one client is let in, none is told that several may come.
        multi_conn=request.shared != 1,
        write_through=request.cache in WRITE_THROUGH,
        bitmaps=request.bitmaps,
        allocation_depth=request.allocation_depth,
    )
    # What is thrown away needn't be flushed.
    no_flush = request.cache == "unsafe" or overlay is not None
    image = replace(image, export=export, no_flush=no_flush, offset=request.offset)
    return replace(config, images=(image,), until_last_client=not request.persistent)


def serve_image(
    request: NbdRequest,
    *,
    fork: bool = False,
    pid_file: str | None = None,
    owns_process: bool = False,
    keep: Callable[[Daemon], None] = lambda daemon: None,
) -> None:
    """Serve until the end. `keep` is handed what must live until the process ends, where
    `owns_process`.

    Context: the main thread, in which no loop runs. Raises: ImageError, DaemonError, OSError.
    """
    if pid_file is not None:
        pid_file = os.path.abspath(pid_file)
    detach = go_to_background() if fork else None
    with ExitStack() as stack:
        overlay = None
        if request.temporary:
            overlay = stack.enter_context(temporary_overlay(request.image, fmt=request.fmt))

        def ready(lines: list[str]) -> None:
            if overlay is not None:
                os.unlink(overlay)
            if pid_file is not None:
                stack.callback(_new_pid_file(pid_file).remove)
            if detach is not None:
                detach()

        daemon = Daemon(
            config_of(request, overlay=overlay),
            notify=make_notify(os.environ.get("NOTIFY_SOCKET")),
        )
        keep(daemon)
        daemon.run(handle_signals=True, then_exit=owns_process, on_ready=ready)


def _new_pid_file(path: str) -> PidFile:
    try:
        return PidFile(path)
    except BlockingIOError:
        raise DaemonError(path, "belongs to a server that runs") from None
    except OSError as error:
        raise DaemonError(path, error.strerror or str(error)) from error
