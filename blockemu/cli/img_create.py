# SPDX-License-Identifier: Apache-2.0
"""`blockemu img create`."""

from __future__ import annotations

import click

from blockemu.cli.object_option import object_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
SIZE is in bytes, or with a suffix k, M, G, T, P or E (powers of 1024); `1.5G` is fine. It may be
left out when there is a backing file, whose size is then taken.

\b
Examples:
  blockemu img create disk.raw 1G
  blockemu img create -f qcow2 -o cluster_size=128k,preallocation=metadata disk.qcow2 10G
  blockemu img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  blockemu img create -f qcow2 -o help
"""


@click.command(epilog=EPILOG)
@click.option(
    "-f",
    "--format",
    "fmt",
    default="raw",
    show_default=True,
    metavar="FORMAT",
    help="Format of the new image: raw or qcow2.",
)
@click.option(
    "-o",
    "--options",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Options of the format; `-o help` (or `-o ?`) lists them. A comma in a value is doubled.",
)
@click.option(
    "-b",
    "--backing",
    metavar="FILE",
    help="The image that shows through where the new one holds no data. A relative name "
    "is relative to the new image's folder.",
)
@click.option("-F", "--backing-format", metavar="FORMAT", help="Format of the backing file.")
@click.option(
    "-u",
    "--unsafe-backing",
    is_flag=True,
    help="Don't look at the backing file: it may be missing. SIZE must be given.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.argument("filename", metavar="FILE", required=False)
@click.argument("size", required=False)
@object_option
@click.help_option("-h", "--help")
@verbose_option
def create(
    fmt: str,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    unsafe_backing: bool,
    quiet: bool,
    filename: str | None,
    size: str | None,
) -> None:
    """Create the disk image FILE of SIZE. An image that is there already is overwritten."""
    from blockemu.img.create import CreateRequest, create_image
    from blockemu.img.options import help_wanted, options_help

    if any(help_wanted(text) for text in options):
        click.echo(options_help(fmt))
        return
    if filename is None:
        raise click.UsageError("Missing argument 'FILE'.")
    request = CreateRequest.from_user(
        filename,
        size,
        fmt=fmt,
        option_texts=options,
        backing_file=backing,
        backing_fmt=backing_format,
        unsafe_backing=unsafe_backing,
    )
    create_image(request, announce=lambda line: None if quiet else click.echo(line))
