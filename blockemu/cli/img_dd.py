# SPDX-License-Identifier: Apache-2.0
"""`blockemu img dd`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import force_share_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
Operands: if=INPUT and of=OUTPUT; bs=BLOCK_SIZE (512 by default), count=BLOCKS, skip=BLOCKS. Numbers
may have a suffix k, M, G, T, P or E.

\b
Examples:
  blockemu img dd -f raw -O qcow2 bs=1M if=disk.raw of=disk.qcow2
  blockemu img dd -f qcow2 bs=64k skip=16 if=disk.qcow2 of=rest.raw
"""


@click.command(epilog=EPILOG)
@click.option("-f", "--format", "fmt", metavar="FORMAT", help="Format of INPUT: raw or qcow2.")
@click.option(
    "-O",
    "--target-format",
    "target_fmt",
    default="raw",
    show_default=True,
    metavar="FORMAT",
    help="Format of OUTPUT: raw or qcow2.",
)
@force_share_option
@click.argument("operands", metavar="OPERAND...", nargs=-1, required=True)
@click.help_option("-h", "--help")
@verbose_option
def dd(fmt: str | None, target_fmt: str, force_share: bool, operands: tuple[str, ...]) -> None:
    """Copy a part of the disk image INPUT into the new disk image OUTPUT."""
    from blockemu.img.dd import DdRequest, copy_part

    copy_part(
        DdRequest.from_operands(
            operands, source_fmt=fmt, target_fmt=target_fmt, force_share=force_share
        )
    )
