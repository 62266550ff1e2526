# SPDX-License-Identifier: Apache-2.0
"""`blockemu nbd`: what NBD servers offer, and a server like qemu-nbd.

qemu-nbd has no subcommands, so a first word that is none of ours is its command line: a group with
a default command. An image that is called `list` is `./list`.
"""

from __future__ import annotations

import click

from blockemu.cli.lazy_group import LazyGroup

COMMANDS = {
    "info": "blockemu.cli.nbd_info:info",
    "list": "blockemu.cli.nbd_info:list_",
}

EPILOG = """
\b
Examples:
  blockemu nbd list nbd://localhost
  blockemu nbd info --json nbd://localhost/disk
  blockemu nbd info --map 'nbd+unix:///disk?socket=/run/nbd.sock'
"""


@click.group(cls=LazyGroup.of(COMMANDS), epilog=EPILOG)
@click.help_option("-h", "--help")
def nbd() -> None:
    """Tell what NBD servers offer."""
