# SPDX-License-Identifier: Apache-2.0
"""`blockemu img amend`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import image_opts_option, quiet_option
from blockemu.cli.object_option import object_option
from blockemu.cli.progress import progress_bar, progress_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  blockemu img amend -f qcow2 -o compat=0.10 overlay.qcow2
  blockemu img amend -o help
"""


@click.command(epilog=EPILOG)
@click.option(
    "-f",
    "--format",
    "fmt",
    metavar="FORMAT",
    help="Format of the image, qcow2; must be given if the image has a backing file.",
)
@click.option(
    "-o",
    "--options",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="What to change; `-o help` (or `-o ?`) lists it. A comma in a value is doubled.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Also erase the last key slot of an encrypted image, or write over an active one.",
)
@progress_option
@quiet_option
@click.argument("filename", metavar="FILE", required=False)
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def amend(
    fmt: str | None,
    options: tuple[str, ...],
    force: bool,
    progress: bool,
    quiet: bool,
    filename: str | None,
) -> None:
    """Change options of the qcow2 image FILE that it was created with."""
    from blockemu.img.amend import amend_help, amend_image
    from blockemu.img.options import help_wanted

    if any(help_wanted(text) for text in options):
        click.echo(amend_help())
        return
    if filename is None:
        raise click.UsageError("Missing argument 'FILE'.")
    if not options:
        raise click.UsageError("Missing option '-o'.")
    with progress_bar(wanted=progress and not quiet) as show:
        amend_image(filename, fmt=fmt, option_texts=options, force=force, progress=show)
