# SPDX-License-Identifier: Apache-2.0
"""`blockemu img resize`."""

from __future__ import annotations

import re

import click

from blockemu.cli.image_options import format_option, image_opts_option, quiet_option
from blockemu.cli.object_option import object_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
SIZE is in bytes, or with a suffix k, M, G, T, P or E (powers of 1024).

\b
Examples:
  blockemu img resize -f raw disk.raw +10G
  blockemu img resize --shrink disk.qcow2 5G
"""


class SizeComesLast(click.Command):
    """A command whose last word is a size, though it may look like an option: -10G."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click.Command."""
        if args and "--" not in args and re.match(r"-[\d.]", args[-1]):
            args = [*args[:-1], "--", args[-1]]
        return super().parse_args(ctx, args)


@click.command(cls=SizeComesLast, epilog=EPILOG)
@format_option
@click.option(
    "--preallocation",
    type=click.Choice(["off", "metadata", "falloc", "full"]),
    default="off",
    show_default=True,
    help="How the host's space for what is new is taken.",
)
@click.option("--shrink", is_flag=True, help="Let the disk lose what lies behind its new end.")
@quiet_option
@click.argument("filename", metavar="FILE")
@click.argument("size", metavar="[+|-]SIZE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def resize(
    fmt: str | None, preallocation: str, shrink: bool, quiet: bool, filename: str, size: str
) -> None:
    """Make the disk image FILE SIZE long, or longer (+) or shorter (-) by that."""
    from blockemu.img.resize import ResizeRequest, resize_image

    resize_image(
        ResizeRequest(path=filename, size=size, fmt=fmt, preallocation=preallocation, shrink=shrink)
    )
    if not quiet:
        click.echo("Image resized.")
