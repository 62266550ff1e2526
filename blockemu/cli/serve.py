# SPDX-License-Identifier: Apache-2.0
"""`blockemu serve`: images over NBD, with one command."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from blockemu.cli.drive_options import DriveOptions, drive_options
from blockemu.cli.export_options import ExportOptions, export_options
from blockemu.cli.failure import one_line
from blockemu.cli.image_options import image_opts_option
from blockemu.cli.limit_options import limit_options
from blockemu.cli.listener_options import ListenerOptions, listener_options
from blockemu.cli.object_option import object_option
from blockemu.cli.sizes import read_size
from blockemu.cli.thread_options import ThreadOptions, thread_options
from blockemu.cli.tls_options import tls_options
from blockemu.cli.verbosity import CliState, verbose_option

if TYPE_CHECKING:
    from blockemu.limits import Limits
    from blockemu.nbd.tls import TlsPolicy

EPILOG = """
Each IMAGE is an export of its own, named after its file without the extension, and runs on an
IOThread of its own. The first is also the default export, which clients get that ask for none.
When clients can connect, one line per export is printed: its URI, then what it is. SIGTERM and
SIGINT end the daemon in good order: requests are answered, images flushed and closed.

\b
Examples:
  blockemu serve -f qcow2 disk.qcow2
  blockemu serve -f raw --cache direct --bind :: --port 10810 /dev/vg0/disk
  blockemu serve --socket /run/nbd.sock --name root --name data root.qcow2 data.qcow2
  blockemu serve --read-only --control /run/blockemu.qmp disk.qcow2
  blockemu serve --bind :: --object tls-creds-x509,id=tls0,dir=/etc/pki/nbd,endpoint=server
    --tls-creds tls0 disk.qcow2
"""


@click.command(epilog=EPILOG)
@click.option(
    "-f",
    "--format",
    "fmt",
    type=click.Choice(["raw", "qcow2", "luks"]),
    help="Format of the images; without it, it is found out, and an image that names a "
    "backing or data file is refused.",
)
@export_options
@listener_options
@drive_options
@thread_options
@limit_options
@click.option(
    "--metadata-memory",
    "metadata_bytes",
    callback=read_size,
    default=None,
    metavar="SIZE",
    help="Memory for the caches of all images' metadata together.  [default: 1G]",
)
@click.option(
    "--control",
    "control_path",
    metavar="PATH",
    help="Listen for QMP (QEMU's machine protocol) on this unix socket.",
)
@tls_options
@object_option
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.pass_obj
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("images")
def serve(
    state: CliState,
    fmt: str | None,
    exports: ExportOptions,
    listeners: ListenerOptions,
    drive: DriveOptions,
    threads: ThreadOptions,
    limits: Limits,
    tls: TlsPolicy | None,
    metadata_bytes: int | None,
    control_path: str | None,
    images: tuple[str, ...],
) -> None:
    """Serve disk images over NBD until told to stop."""
    from blockemu.cli.open_files import raise_open_files_limit
    from blockemu.config import serve_config
    from blockemu.daemon import Daemon
    from blockemu.drivers.metadata_budget import METADATA_BYTES_MAX
    from blockemu.img.session_objects import session_objects
    from blockemu.notify import make_notify

    config = serve_config(
        images,
        names=exports.names,
        iothreads=threads.names,
        fmt=fmt,
        read_only=exports.read_only,
        snapshot=drive.snapshot,
        direct=drive.direct,
        aio=drive.aio,
        discard=drive.discard,
        detect_zeroes=drive.detect_zeroes,
        overlap_check=drive.overlap_check,
        descriptions=exports.descriptions,
        hidden=exports.hidden,
        default_export=exports.default,
        aliases=exports.aliases,
        export_connections_max=exports.connections_max,
        rotational=exports.rotational,
        resizable=exports.resizable,
        bitmaps=exports.bitmaps,
        allocation_depth=exports.allocation_depth,
        address=listeners.addresses,
        listing=listeners.listing,
        control_path=control_path,
        control_sockets=listeners.control_sockets,
        poll_params=threads.poll_params,
        limits=limits,
        metadata_bytes_max=METADATA_BYTES_MAX if metadata_bytes is None else metadata_bytes,
        tls=tls,
        objects=session_objects(),
    )
    if state.owns_process:
        raise_open_files_limit()
    daemon = Daemon(config, notify=make_notify(os.environ.get("NOTIFY_SOCKET")))
    state.kept = daemon
    daemon.run(handle_signals=True, then_exit=state.owns_process, on_ready=announce)


def announce(lines: list[str]) -> None:
    """Print where the exports are; flushed, since a script may wait for it through a pipe."""
    try:
        for line in lines:
            click.echo(one_line(line))
    except OSError:
        pass  # nobody listens any more; clients can connect all the same
