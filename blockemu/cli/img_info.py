# SPDX-License-Identifier: Apache-2.0
"""`blockemu img info`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import format_option, image_opts_option, output_option
from blockemu.cli.object_option import object_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img info disk.qcow2
  blockemu img info --output json -U disk.qcow2
  blockemu img info --backing-chain -f qcow2 overlay.qcow2
  blockemu img info nbd://localhost/disk
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
@click.option(
    "--backing-chain",
    is_flag=True,
    help="Describe its backing file, too, and so on; an image that has one needs -f.",
)
@click.argument("filename", metavar="FILE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def info(
    fmt: str | None, output: str, force_share: bool, backing_chain: bool, filename: str
) -> None:
    """Describe the disk image FILE: format, sizes, backing file, features."""
    from blockemu.img.info import (
        format_human,
        format_human_chain,
        format_json,
        read_chain_info,
        read_info,
    )

    if backing_chain:
        chain = read_chain_info(filename, fmt=fmt, force_share=force_share)
        click.echo(format_json(chain) if output == "json" else format_human_chain(chain))
        return
    facts = read_info(filename, fmt=fmt, force_share=force_share)
    click.echo(format_json(facts) if output == "json" else format_human(facts))
