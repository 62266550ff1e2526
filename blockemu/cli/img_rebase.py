# SPDX-License-Identifier: Apache-2.0
"""`blockemu img rebase`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import image_opts_option, quiet_option
from blockemu.cli.object_option import object_option
from blockemu.cli.progress import progress_bar, progress_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img rebase -f qcow2 -b new-base.qcow2 -F qcow2 overlay.qcow2
  blockemu img rebase -f qcow2 -b "" overlay.qcow2
  blockemu img rebase -u -b moved/base.qcow2 -F qcow2 overlay.qcow2
"""


@click.command(epilog=EPILOG)
@click.option(
    "-f",
    "--format",
    "fmt",
    metavar="FORMAT",
    help="Format of the image; must be given in the safe mode if the image has a backing file.",
)
@click.option(
    "-u",
    "--unsafe",
    is_flag=True,
    help="Change the names only: for a backing file that was moved. No other file is opened.",
)
@click.option(
    "-b",
    "--backing",
    metavar="FILE",
    help='The new backing file; "" for none. A relative name is relative to the image\'s folder.',
)
@click.option("-F", "--backing-format", metavar="FORMAT", help="Format of the new backing file.")
@progress_option
@quiet_option
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="Read backing files that another process is writing; what is read may be stale.",
)
@click.argument("filename", metavar="FILE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def rebase(
    fmt: str | None,
    unsafe: bool,
    backing: str | None,
    backing_format: str | None,
    progress: bool,
    quiet: bool,
    force_share: bool,
    filename: str,
) -> None:
    """Give the image FILE another backing file, without a change that its guest could see."""
    from blockemu.img.rebase import RebaseRequest, rebase_image

    request = RebaseRequest(
        path=filename,
        fmt=fmt,
        backing_file=backing,
        backing_fmt=backing_format,
        unsafe=unsafe,
        force_share=force_share,
    )
    with progress_bar(wanted=progress and not quiet) as show:
        rebase_image(request, progress=show)
