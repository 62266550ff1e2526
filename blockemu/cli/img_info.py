# SPDX-License-Identifier: Apache-2.0
"""`blockemu img info`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import format_option, output_option
from blockemu.cli.image_opts import image_opts_option, object_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img info disk.qcow2
  blockemu img info --output json -U disk.qcow2
"""


@click.command(epilog=EPILOG)
@format_option
@output_option
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="Look at an image that another process is writing; what is shown may be stale.",
)
@click.argument("filename", metavar="FILE")
@object_option
@image_opts_option("filename")
@click.help_option("-h", "--help")
@verbose_option
def info(fmt: str | None, output: str, force_share: bool, filename: str) -> None:
    """Describe the disk image FILE: format, sizes, backing file, features."""
    from blockemu.img.info import format_human, format_json, read_info

    facts = read_info(filename, fmt=fmt, force_share=force_share)
    click.echo(format_json(facts) if output == "json" else format_human(facts))
