# SPDX-License-Identifier: Apache-2.0
"""`blockemu img commit`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import image_opts_option, quiet_option
from blockemu.cli.object_option import object_option
from blockemu.cli.progress import progress_bar, progress_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img commit -f qcow2 overlay.qcow2
  blockemu img commit -f qcow2 -d overlay.qcow2
  blockemu img commit -f qcow2 -b base.raw overlay.qcow2
"""


@click.command(epilog=EPILOG)
@click.option(
    "-f",
    "--format",
    "fmt",
    metavar="FORMAT",
    help="Format of the image, qcow2; an image with a backing file isn't opened without.",
)
@click.option("-d", "--drop", is_flag=True, help="Don't empty the image afterwards.")
@click.option(
    "-b",
    "--base",
    metavar="FILE",
    help="Commit down to this image of the backing chain. Implies -d.",
)
@progress_option
@quiet_option
@click.argument("filename", metavar="FILE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def commit(
    fmt: str | None,
    drop: bool,
    base: str | None,
    progress: bool,
    quiet: bool,
    filename: str,
) -> None:
    """Copy what the image FILE holds into its backing file, and empty FILE."""
    from blockemu.img.commit import CommitRequest, commit_image

    request = CommitRequest(path=filename, fmt=fmt, base=base, drop=drop)
    with progress_bar(wanted=progress and not quiet) as show:
        commit_image(request, progress=show)
    if not quiet:
        click.echo("Image committed.")
