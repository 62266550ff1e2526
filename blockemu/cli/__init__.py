# SPDX-License-Identifier: Apache-2.0
"""The `blockemu` command: one file a subcommand, and one for how it fails.

Commands are imported when they are called, and import what they run when they run it: `blockemu
--help` needn't load a storage daemon.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import blockemu
from blockemu.cli.failure import leave, run_command
from blockemu.cli.lazy_group import LazyGroup
from blockemu.cli.verbosity import CliState, verbose_option

EPILOG = """
\b
Examples:
  blockemu img create -f qcow2 disk.qcow2 10G
  blockemu serve -f qcow2 disk.qcow2
  blockemu serve --socket /tmp/nbd.sock --cache direct a.raw b.raw -f raw
"""


@click.group(
    cls=LazyGroup.of(
        {
            "img": "blockemu.cli.img:img",
            "nbd": "blockemu.cli.nbd:nbd",
            "serve": "blockemu.cli.serve:serve",
        }
    ),
    epilog=EPILOG,
)
@click.version_option(blockemu.__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.help_option("-h", "--help")
@verbose_option
def cli() -> None:
    """A storage daemon: serves disk images (raw, qcow2) over NBD, and makes and describes them.

    Every command has its own --help. The manual is docs/cli.md.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exits: 0 done, 1 failed (one line on stderr says why), 2 wrong usage."""
    state = CliState(owns_process=arguments is None)
    status = run_command(cli, list(sys.argv[1:] if arguments is None else arguments), state)
    if state.owns_process:
        leave(status)
    sys.exit(status)
