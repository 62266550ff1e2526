# SPDX-License-Identifier: Apache-2.0
"""`blockemu img`: the group of qemu-img's subcommands."""

from __future__ import annotations

import click

from blockemu.cli.img_amend import amend
from blockemu.cli.img_bench import bench
from blockemu.cli.img_bitmap import bitmap
from blockemu.cli.img_check import check
from blockemu.cli.img_commit import commit
from blockemu.cli.img_compare import compare
from blockemu.cli.img_convert import convert
from blockemu.cli.img_create import create
from blockemu.cli.img_dd import dd
from blockemu.cli.img_info import info
from blockemu.cli.img_map import map_
from blockemu.cli.img_measure import measure
from blockemu.cli.img_rebase import rebase
from blockemu.cli.img_resize import resize
from blockemu.cli.img_snapshot import snapshot

EPILOG = """
\b
Examples:
  blockemu img create -f qcow2 -o cluster_size=64k disk.qcow2 10G
  blockemu img info --output json disk.qcow2
  blockemu img snapshot -c before-upgrade disk.qcow2
  blockemu img check disk.qcow2
"""


@click.group(epilog=EPILOG)
@click.help_option("-h", "--help")
def img() -> None:
    """Make and describe disk images: qemu-img's subcommands, with its options and output."""


img.add_command(bench)
img.add_command(bitmap)
img.add_command(compare)
img.add_command(convert)
img.add_command(check)
img.add_command(amend)
img.add_command(commit)
img.add_command(create)
img.add_command(dd)
img.add_command(info)
img.add_command(map_)
img.add_command(measure)
img.add_command(resize)
img.add_command(snapshot)
img.add_command(rebase)
