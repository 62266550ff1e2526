# SPDX-License-Identifier: Apache-2.0
"""`blockemu img snapshot`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import format_option, image_opts_option
from blockemu.cli.object_option import object_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
Without -a, -c and -d, snapshots are listed. Nobody else may use the image while they are changed.

\b
Examples:
  blockemu img snapshot -c before-upgrade disk.qcow2
  blockemu img snapshot -l disk.qcow2
  blockemu img snapshot -a before-upgrade disk.qcow2
  blockemu img snapshot -d before-upgrade disk.qcow2
"""


@click.command(epilog=EPILOG)
@click.option("-l", "--list", "listed", is_flag=True, help="List the snapshots.")
@click.option(
    "-a",
    "--apply",
    "applied",
    metavar="SNAPSHOT",
    help="Make the disk what it was at this snapshot (an id, or else a name), its size included. "
    "What it is now is lost.",
)
@click.option(
    "-c", "--create", "created", metavar="SNAPSHOT", help="Keep the disk as it is, by this name."
)
@click.option(
    "-d",
    "--delete",
    "deleted",
    metavar="SNAPSHOT",
    help="Delete this snapshot (a name, or else an id).",
)
@format_option
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="With -l: look at an image that another process is writing.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and the list.")
@click.argument("filename", metavar="FILE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def snapshot(
    listed: bool,
    applied: str | None,
    created: str | None,
    deleted: str | None,
    fmt: str | None,
    force_share: bool,
    quiet: bool,
    filename: str,
) -> None:
    """List, make, go back to or delete internal snapshots of the disk image FILE."""
    from blockemu.img import snapshot as work
    from blockemu.img.snapshot_list import format_snapshots

    del quiet  # there is nothing else to print yet
    asked = listed + sum(name is not None for name in (applied, created, deleted))
    if asked > 1:
        raise click.UsageError("-l, -a, -c and -d exclude each other.")
    if force_share and asked and not listed:
        raise click.UsageError("-U is for listing only.")
    if applied is not None:
        work.apply_snapshot(filename, applied, fmt=fmt)
    elif created is not None:
        work.create_snapshot(filename, created, fmt=fmt)
    elif deleted is not None:
        work.delete_snapshot(filename, deleted, fmt=fmt)
    else:
        for line in format_snapshots(
            work.list_snapshots(filename, fmt=fmt, force_share=force_share)
        ):
            click.echo(line)
