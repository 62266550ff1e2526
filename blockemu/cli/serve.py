# SPDX-License-Identifier: Apache-2.0
"""`blockemu serve`: images over NBD, with one command."""

from __future__ import annotations

import os

import click

from blockemu.cli.failure import one_line
from blockemu.cli.image_options import image_opts_option
from blockemu.cli.object_option import object_option
from blockemu.cli.sizes import read_size
from blockemu.cli.verbosity import CliState, verbose_option

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
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Export name of an image; repeat it for more images, in their order.",
)
@click.option(
    "--socket", "socket_path", metavar="PATH", help="Listen on this unix socket, and not on TCP."
)
@click.option(
    "--bind",
    "host",
    metavar="ADDR",
    default=None,
    help="Listen on this address or host name.  [default: 127.0.0.1]",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=None,
    help="Listen on this TCP port; 0 is any free one.  [default: 10809]",
)
@click.option("--read-only", "-r", is_flag=True, help="Open the images for reading only.")
@click.option(
    "-l",
    "--load-snapshot",
    "snapshot",
    metavar="SNAPSHOT",
    help="Serve the images as they were at this internal snapshot (an id, or else a name), for "
    "reading only.",
)
@click.option(
    "--cache",
    type=click.Choice(["direct", "writeback"]),
    default="writeback",
    show_default=True,
    help="direct goes past the host's page cache (O_DIRECT).",
)
@click.option(
    "--aio",
    type=click.Choice(["native", "threads"]),
    default="native",
    show_default=True,
    help="How host I/O is done. native is Linux AIO with --cache direct; with writeback, "
    "reads that the page cache can answer are done in place, the rest by threads.",
)
@click.option(
    "--discard",
    type=click.Choice(["ignore", "unmap"]),
    default="unmap",
    show_default=True,
    help="unmap gives space back to the host that a client trims; ignore keeps it.",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice(["off", "on", "unmap"]),
    default="off",
    show_default=True,
    help="on makes writes of nothing but zeroes take little time and, in qcow2, space; "
    "unmap gives their space back as well.",
)
@click.option(
    "--overlap-check",
    type=click.Choice(["none", "constant", "cached", "all"]),
    default=None,
    help="Which metadata of a qcow2 image is looked out for before something is written.  "
    "[default: cached]",
)
@click.option(
    "--iothread",
    "iothreads",
    multiple=True,
    metavar="NAME",
    help="Run all exports on one thread of this name; or, repeated once for each image, "
    "each on the one named.",
)
@click.option(
    "--poll-max-ns",
    type=click.IntRange(0, 10**9),
    default=None,
    metavar="NS",
    help="Let a thread without work look for some for up to so many nanoseconds before it "
    "sleeps: shorter latency for more CPU time.  [default: 100000; 0 on one core]",
)
@click.option(
    "--poll-grow",
    type=click.IntRange(0, 1000),
    default=0,
    metavar="FACTOR",
    help="By how much that time grows while work comes within it; 0 is 2.",
)
@click.option(
    "--poll-shrink",
    type=click.IntRange(0, 1000),
    default=0,
    metavar="DIVISOR",
    help="By how much it shrinks when work comes later; 0 begins anew.",
)
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
@object_option
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.pass_obj
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("images")
def serve(
    state: CliState,
    fmt: str | None,
    names: tuple[str, ...],
    socket_path: str | None,
    host: str | None,
    port: int | None,
    read_only: bool,
    snapshot: str | None,
    cache: str,
    aio: str,
    discard: str,
    detect_zeroes: str,
    overlap_check: str | None,
    iothreads: tuple[str, ...],
    poll_max_ns: int | None,
    poll_grow: int,
    poll_shrink: int,
    metadata_bytes: int | None,
    control_path: str | None,
    images: tuple[str, ...],
) -> None:
    """Serve disk images over NBD until told to stop."""
    from blockemu.cli.open_files import raise_open_files_limit
    from blockemu.config import NBD_PORT, TcpAddress, UnixAddress, serve_config
    from blockemu.daemon import Daemon
    from blockemu.drivers.metadata_budget import METADATA_BYTES_MAX
    from blockemu.img.session_objects import session_objects
    from blockemu.loop.iothread import default_poll_params
    from blockemu.loop.poller import PollParams
    from blockemu.notify import make_notify

    address: TcpAddress | UnixAddress
    if socket_path is not None:
        if host is not None or port is not None:
            raise click.UsageError("--socket goes without --bind and --port.")
        address = UnixAddress(socket_path)
    else:
        address = TcpAddress(
            "127.0.0.1" if host is None else host, NBD_PORT if port is None else port
        )
    if metadata_bytes is None:
        metadata_bytes = METADATA_BYTES_MAX
    objects = session_objects()
    config = serve_config(
        images,
        names=names,
        iothreads=iothreads,
        fmt=fmt,
        read_only=read_only,
        snapshot=snapshot,
        direct=cache == "direct",
        aio=aio,
        discard=discard,
        detect_zeroes=detect_zeroes,
        overlap_check=overlap_check,
        address=address,
        control_path=control_path,
        poll_params=PollParams(
            max_ns=default_poll_params().max_ns if poll_max_ns is None else poll_max_ns,
            grow=poll_grow,
            shrink=poll_shrink,
        ),
        metadata_bytes_max=metadata_bytes,
        secrets=objects.secrets,
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
