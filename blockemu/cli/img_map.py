# SPDX-License-Identifier: Apache-2.0
"""`blockemu img map`."""

from __future__ import annotations

import click

from blockemu.cli.failure import one_line
from blockemu.cli.image_options import force_share_option, image_opts_option, output_option
from blockemu.cli.object_option import object_option
from blockemu.cli.sizes import read_size
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img map -f qcow2 overlay.qcow2
  blockemu img map --output json -s 1G -l 64M disk.raw
"""


@click.command("map", epilog=EPILOG)
@click.option(
    "-f",
    "--format",
    "fmt",
    metavar="FORMAT",
    help="Format of the image: raw or qcow2; must be given for an image that has a backing file.",
)
@output_option
@click.option(
    "-s",
    "--start-offset",
    "start",
    metavar="OFFSET",
    callback=read_size,
    default="0",
    help="Begin at this byte of the disk.",
)
@click.option(
    "-l",
    "--max-length",
    "length",
    metavar="LENGTH",
    callback=read_size,
    help="Show no more than so many bytes.  [default: to the disk's end]",
)
@force_share_option
@click.argument("filename", metavar="FILE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def map_(
    fmt: str | None, output: str, start: int, length: int | None, force_share: bool, filename: str
) -> None:
    """Show where the bytes of the disk image FILE lie, through its whole backing chain."""
    from blockemu.img.map import map_image

    map_image(
        filename,
        lambda line: click.echo(one_line(line)),
        output=output,
        fmt=fmt,
        start=start,
        length=length,
        force_share=force_share,
    )
