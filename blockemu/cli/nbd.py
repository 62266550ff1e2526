# SPDX-License-Identifier: Apache-2.0
"""`blockemu nbd`: what NBD servers offer, and a server that stands in for qemu-nbd.

qemu-nbd has no subcommands: a first word that is none of ours begins its command line.
"""

from __future__ import annotations

import click

from blockemu.cli.default_group import DefaultGroup

COMMANDS = {
    "info": "blockemu.cli.nbd_info:info",
    "list": "blockemu.cli.nbd_info:list_",
    "serve": "blockemu.cli.nbd_serve:serve",
}

EPILOG = """
Everything that doesn't begin with a command's name is for `serve`, which may be left out: a command
line of qemu-nbd's works behind `blockemu nbd`. An image that is called as a command is ./list.

\b
Examples:
  blockemu nbd -f qcow2 disk.qcow2
  blockemu nbd -t -e 0 -x disk -k /run/nbd.sock -f raw disk.raw
  blockemu nbd list nbd://localhost
  blockemu nbd info --json nbd://localhost/disk
"""


class NbdGroup(DefaultGroup):
    """The commands of `blockemu nbd`."""

    places = COMMANDS
    default = "serve"


@click.group(cls=NbdGroup, epilog=EPILOG)
@click.help_option("-h", "--help")
def nbd() -> None:
    """Serve a disk image as qemu-nbd does, and tell what NBD servers offer."""
