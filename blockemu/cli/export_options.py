# SPDX-License-Identifier: Apache-2.0
"""What clients are offered, and under which name: the options of commands that serve."""

from __future__ import annotations

from dataclasses import dataclass

import click

from blockemu.cli.option_group import option_group


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """`names` belong to the images, in their order."""

    names: tuple[str, ...]
    read_only: bool


export_options = option_group(
    "exports",
    lambda names, read_only: ExportOptions(names=names, read_only=read_only),
    click.option(
        "--name",
        "names",
        multiple=True,
        metavar="NAME",
        help="Export name of an image; repeat it for more images, in their order.",
    ),
    click.option("--read-only", "-r", is_flag=True, help="Open the images for reading only."),
)
"""--name, --read-only, handed in as `exports`."""
