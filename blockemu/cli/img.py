# SPDX-License-Identifier: Apache-2.0
"""`blockemu img`: the group of qemu-img's subcommands."""

from __future__ import annotations

import click

from blockemu.cli.lazy_group import LazyGroup

COMMANDS = {
    "amend": "blockemu.cli.img_amend:amend",
    "bench": "blockemu.cli.img_bench:bench",
    "bitmap": "blockemu.cli.img_bitmap:bitmap",
    "check": "blockemu.cli.img_check:check",
    "commit": "blockemu.cli.img_commit:commit",
    "compare": "blockemu.cli.img_compare:compare",
    "convert": "blockemu.cli.img_convert:convert",
    "create": "blockemu.cli.img_create:create",
    "dd": "blockemu.cli.img_dd:dd",
    "info": "blockemu.cli.img_info:info",
    "map": "blockemu.cli.img_map:map_",
    "measure": "blockemu.cli.img_measure:measure",
    "rebase": "blockemu.cli.img_rebase:rebase",
    "resize": "blockemu.cli.img_resize:resize",
    "snapshot": "blockemu.cli.img_snapshot:snapshot",
}

EPILOG = """
\b
Examples:
  blockemu img create -f qcow2 -o cluster_size=64k disk.qcow2 10G
  blockemu img info --output json disk.qcow2
  blockemu img snapshot -c before-upgrade disk.qcow2
  blockemu img check disk.qcow2
"""


@click.group(cls=LazyGroup.of(COMMANDS), epilog=EPILOG)
@click.help_option("-h", "--help")
def img() -> None:
    """Make and describe disk images: qemu-img's subcommands, with its options and output."""
