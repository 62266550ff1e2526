# SPDX-License-Identifier: Apache-2.0
"""Options of `blockemu nbd IMAGE` by theme, in qemu-nbd's spelling and with its defaults."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockemu.cli.option_group import option_group

if TYPE_CHECKING:
    from blockemu.addresses import Address
    from blockemu.drivers.nbd.address import NbdAddress

F = TypeVar("F", bound=Callable[..., Any])

LOCALHOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdListenOptions:
    """As they were written."""

    socket_path: str | None
    host: str | None
    port: int | None

    def addresses(self, environment: MutableMapping[str, str]) -> tuple[Address, ...]:
        """Where to listen: on the sockets that a service manager handed over, or here."""
        import os

        from blockemu.activation import take_activation
        from blockemu.addresses import NBD_PORT, TcpAddress, UnixAddress

        inherited = take_activation(environment, pid=os.getpid()).nbd
        if inherited:
            if (self.socket_path, self.host, self.port) != (None, None, None):
                raise click.UsageError(
                    "--socket, --bind and --port don't go with sockets that were handed over "
                    "(LISTEN_FDS)."
                )
            return inherited
        if self.socket_path is not None:
            return (UnixAddress(os.path.abspath(self.socket_path)),)
        port = NBD_PORT if self.port is None else self.port
        return (TcpAddress(LOCALHOST if self.host is None else self.host, port),)

    def server(self) -> NbdAddress:
        """The server there, for a client."""
        from blockemu.addresses import NBD_PORT
        from blockemu.drivers.nbd.address import NbdAddress

        if self.socket_path is not None:
            return NbdAddress(path=self.socket_path)
        port = NBD_PORT if self.port is None else self.port
        return NbdAddress(host=LOCALHOST if self.host is None else self.host, port=port)


nbd_listen_options = option_group(
    "listen",
    lambda socket_path, host, port: NbdListenOptions(socket_path=socket_path, host=host, port=port),
    click.option(
        "-k",
        "--socket",
        "socket_path",
        metavar="PATH",
        help="Listen on this unix socket, and not on TCP.",
    ),
    click.option(
        "-b",
        "--bind",
        "host",
        metavar="ADDR",
        help=f"Listen on this address or host name.  [default: {LOCALHOST}]",
    ),
    click.option(
        "-p",
        "--port",
        type=click.IntRange(0, 65535),
        help="Listen on this TCP port; 0 is any free one.  [default: 10809]",
    ),
)
"""-k, -b, -p, handed in as `listen`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdDriveOptions:
    """How the image is opened. `snapshot`: id or name of an internal one. `temporary`: writes are
    thrown away at the end."""

    snapshot: str | None
    temporary: bool
    cache: str
    aio: str
    discard: str
    detect_zeroes: str


def _drive(
    snapshot: str | None,
    temporary: bool,
    nocache: bool,
    cache: str | None,
    aio: str,
    discard: str,
    detect_zeroes: str,
) -> NbdDriveOptions:
    if nocache and cache is not None:
        raise click.UsageError("--nocache is --cache none: give one of them.")
    if temporary and snapshot is not None:
        raise click.UsageError("--snapshot and --load-snapshot don't go together.")
    return NbdDriveOptions(
        snapshot=None if snapshot is None else snapshot_name(snapshot),
        temporary=temporary,
        cache="none" if nocache else cache or "writeback",
        aio=aio,
        discard={"off": "ignore", "on": "unmap"}.get(discard, discard),
        detect_zeroes=detect_zeroes,
    )


def snapshot_name(text: str) -> str:
    """The id or name in qemu-nbd's `snapshot.id=ID,snapshot.name=NAME`, or the text itself."""
    parts = [part.partition("=") for part in text.split(",")]
    said = {key: value for key, _, value in parts if key in ("snapshot.id", "snapshot.name")}
    if not said:
        return text
    if len(said) < len(parts) or len(said) > 1:
        raise click.UsageError("--load-snapshot takes snapshot.id=ID, snapshot.name=NAME, or one.")
    return next(iter(said.values()))


nbd_drive_options = option_group(
    "drive",
    _drive,
    click.option(
        "-l",
        "--load-snapshot",
        "snapshot",
        metavar="SNAPSHOT",
        help="Serve the image as it was at this internal snapshot, for reading only: an id or "
        "else a name, snapshot.id=ID or snapshot.name=NAME.",
    ),
    click.option(
        "-s",
        "--snapshot",
        "temporary",
        is_flag=True,
        help="Leave the image as it is: writes go to a temporary overlay (in $TMPDIR, or "
        "/var/tmp), which is thrown away at the end.",
    ),
    click.option("-n", "--nocache", is_flag=True, help="The same as --cache none."),
    click.option(
        "--cache",
        type=click.Choice(["none", "writeback", "writethrough", "directsync", "unsafe"]),
        help="none goes past the host's cache; writethrough and directsync (past it, too) have "
        "each write reach the disk; unsafe ignores flushes.  [default: writeback]",
    ),
    click.option(
        "--aio",
        type=click.Choice(["native", "threads"]),
        default="native",
        show_default=True,
        help="How host I/O is done; native is Linux AIO past the cache, threads otherwise.",
    ),
    click.option(
        "--discard",
        type=click.Choice(["ignore", "off", "unmap", "on"]),
        default="ignore",
        show_default=True,
        help="unmap (or on) gives space back that a client trims; ignore (or off) keeps it.",
    ),
    click.option(
        "--detect-zeroes",
        type=click.Choice(["off", "on", "unmap"]),
        default="off",
        show_default=True,
        help="on makes writes of nothing but zeroes cheap; unmap gives their space back as well.",
    ),
)
"""-l, -s, -n, --cache, --aio, --discard, --detect-zeroes, handed in as `drive`."""


_REFUSED = (
    (
        ("-c", "--connect"),
        "DEV",
        "--connect: the kernel's device is nbd-client's to attach: serve with -k or -p, then "
        "nbd-client -unix PATH {0}, or nbd-client HOST PORT {0}.",
        "Not here: nbd-client attaches the kernel's device.",
    ),
    (
        ("-d", "--disconnect"),
        "DEV",
        "--disconnect: the kernel's device is nbd-client's to detach: nbd-client -d {0}.",
        "Not here: nbd-client -d detaches it.",
    ),
    (
        ("-T", "--trace"),
        "PATTERN",
        "--trace: QEMU's trace events aren't here; -v and -vv log what happens.",
        "Not here: -v and -vv log what happens.",
    ),
    (
        ("--selinux-label",),
        "LABEL",
        "--selinux-label: sockets aren't labelled: let the service manager do it, and hand over "
        "the socket (LISTEN_FDS).",
        "Not here: a service manager labels the sockets that it hands over.",
    ),
)


def refused_options(function: F) -> F:
    """Options of qemu-nbd that aren't ours, each refused by a line that says what to do instead."""
    for names, metavar, reason, help_text in reversed(_REFUSED):
        function = click.option(
            *names,
            metavar=metavar,
            expose_value=False,
            callback=_refuse(reason),
            help=help_text,
        )(function)
    return function


def _refuse(reason: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
    def refuse(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(reason.format(value))

    return refuse
