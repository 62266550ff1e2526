# SPDX-License-Identifier: Apache-2.0
"""`blockemu nbd IMAGE`: qemu-nbd's options, for what it does without a kernel."""

from __future__ import annotations

import os

import click

import blockemu
from blockemu.cli.failure import one_line
from blockemu.cli.image_options import image_opts_option
from blockemu.cli.nbd_options import (
    NbdDriveOptions,
    NbdListenOptions,
    nbd_drive_options,
    nbd_listen_options,
    refused_options,
)
from blockemu.cli.object_option import object_option
from blockemu.cli.sizes import read_size
from blockemu.cli.tls_options import NbdTlsOptions, nbd_tls_options
from blockemu.cli.verbosity import CliState, verbose_option

EPILOG = """
The server ends when its last client has left, unless -t is given; SIGTERM and SIGINT end it in good
order at any time. Nothing is printed: connect when the socket is there, or use --fork, which
returns when clients can connect.

\b
Examples:
  blockemu nbd -f qcow2 disk.qcow2
  blockemu nbd -t -e 0 -x disk -D "my disk" -k /run/nbd.sock -f raw disk.raw
  blockemu nbd --fork --pid-file /run/nbd.pid -r -b 0.0.0.0 -f qcow2 disk.qcow2
  blockemu nbd -L -k /run/nbd.sock
"""


@click.command(epilog=EPILOG)
@nbd_listen_options
@click.option(
    "-x",
    "--export-name",
    default="",
    metavar="NAME",
    help="What clients ask for.  [default: the empty name]",
)
@click.option(
    "-D", "--description", default="", metavar="TEXT", help="What clients are told of the image."
)
@click.option(
    "-e",
    "--shared",
    type=click.IntRange(0, 2**31 - 1),
    default=1,
    show_default=True,
    metavar="N",
    help="Clients at once; more wait until one leaves. 0 is as many as there is room for.",
)
@click.option("-t", "--persistent", is_flag=True, help="Don't end when the last client has left.")
@click.option(
    "-A",
    "--allocation-depth",
    is_flag=True,
    help="Tell clients that ask in which image of the backing chain bytes are "
    "(qemu:allocation-depth).",
)
@click.option(
    "-B",
    "--bitmap",
    "bitmaps",
    multiple=True,
    metavar="NAME",
    help="Tell clients that ask what this dirty bitmap holds (qemu:dirty-bitmap:NAME); may be "
    "repeated.",
)
@click.option(
    "-o",
    "--offset",
    callback=read_size,
    default="0",
    metavar="OFFSET",
    help="Leave out so many bytes at the disk's start.",
)
@click.option(
    "-f",
    "--format",
    "fmt",
    type=click.Choice(["raw", "qcow2", "luks"]),
    help="Format of the image; without it, it is found out, and an image that names a backing or "
    "data file is refused.",
)
@click.option("-r", "--read-only", is_flag=True, help="Open the image for reading only.")
@nbd_drive_options
@nbd_tls_options
@object_option
@click.option("--fork", is_flag=True, help="Go to the background; return when clients can connect.")
@click.option(
    "--pid-file",
    metavar="PATH",
    help="Write the server's process id to this file, which is removed at the end.",
)
@click.option(
    "-L",
    "--list",
    "list_",
    is_flag=True,
    help="Don't serve: list the exports of the server at -k, or -b and -p.",
)
@refused_options
@click.version_option(blockemu.__version__, "-V", "--version", message="blockemu %(version)s")
@click.argument("image", required=False, metavar="IMAGE")
@click.pass_obj
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("image")
def serve(
    state: CliState,
    listen: NbdListenOptions,
    export_name: str,
    description: str,
    shared: int,
    persistent: bool,
    allocation_depth: bool,
    bitmaps: tuple[str, ...],
    offset: int,
    fmt: str | None,
    read_only: bool,
    drive: NbdDriveOptions,
    tls: NbdTlsOptions,
    fork: bool,
    pid_file: str | None,
    list_: bool,
    image: str | None,
) -> None:
    """Serve the disk image IMAGE over NBD, as qemu-nbd does and with its options."""
    from blockemu.cli.open_files import raise_open_files_limit
    from blockemu.img.session_objects import session_objects
    from blockemu.qemu_nbd import NbdRequest, serve_image

    if list_:
        _list(listen, tls, image)
        return
    if image is None:
        raise click.UsageError("Missing argument 'IMAGE'.")
    request = NbdRequest(
        image=image,
        fmt=fmt,
        addresses=listen.addresses(os.environ),
        export_name=export_name,
        description=description,
        shared=shared,
        persistent=persistent,
        allocation_depth=allocation_depth,
        bitmaps=bitmaps,
        offset=offset,
        read_only=read_only or drive.snapshot is not None,
        snapshot=drive.snapshot,
        temporary=drive.temporary,
        cache=drive.cache,
        aio=drive.aio,
        discard=drive.discard,
        detect_zeroes=drive.detect_zeroes,
        objects=session_objects(),
        tls=tls.policy(),
    )
    if state.owns_process:
        raise_open_files_limit()
    serve_image(
        request,
        fork=fork,
        pid_file=pid_file,
        owns_process=state.owns_process,
        keep=lambda daemon: setattr(state, "kept", daemon),
    )


def _list(listen: NbdListenOptions, tls: NbdTlsOptions, image: str | None) -> None:
    from blockemu.nbdinfo.qemu_listing import list_exports

    if image is not None:
        raise click.UsageError("--list takes no image.")
    for line in list_exports(listen.server(), tls_id=tls.credentials_id, tls_hostname=tls.hostname):
        click.echo(one_line(line))
