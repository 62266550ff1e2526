# SPDX-License-Identifier: Apache-2.0
"""What clients are offered, and under which name: the options of commands that serve."""

from __future__ import annotations

from dataclasses import dataclass

import click

from blockemu.cli.option_group import option_group


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """`names` and `descriptions` belong to the images, in their order; `aliases` are further
    exports, as they were written; `rotational` None asks the host."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    default: str | None
    hidden: tuple[str, ...]
    aliases: tuple[str, ...]
    connections_max: int | None
    rotational: bool | None
    resizable: bool
    bitmaps: tuple[str, ...]
    allocation_depth: bool
    read_only: bool


def _exports(
    names: tuple[str, ...],
    descriptions: tuple[str, ...],
    default: str | None,
    hidden: tuple[str, ...],
    aliases: tuple[str, ...],
    connections_max: int | None,
    rotational: str,
    resizable: bool,
    bitmaps: tuple[str, ...],
    allocation_depth: bool,
    read_only: bool,
) -> ExportOptions:
    return ExportOptions(
        names=names,
        descriptions=descriptions,
        default=default,
        hidden=hidden,
        aliases=aliases,
        connections_max=connections_max,
        rotational=None if rotational == "auto" else rotational == "on",
        resizable=resizable,
        bitmaps=bitmaps,
        allocation_depth=allocation_depth,
        read_only=read_only,
    )


export_options = option_group(
    "exports",
    _exports,
    click.option(
        "--name",
        "names",
        multiple=True,
        metavar="NAME",
        help="Export name of an image; repeat it for more images, in their order.",
    ),
    click.option(
        "--description",
        "descriptions",
        multiple=True,
        metavar="TEXT",
        help="What clients are told of an image; repeat it for more images, in their order.",
    ),
    click.option(
        "--default",
        metavar="NAME",
        default=None,
        help="The export for clients that ask for none.  [default: the first that isn't hidden]",
    ),
    click.option(
        "--hidden",
        multiple=True,
        metavar="NAME",
        help="Don't list this export; clients that know its name get in. May be repeated.",
    ),
    click.option(
        "--export",
        "aliases",
        multiple=True,
        metavar="name=NAME,of=EXPORT,...",
        help="One more export of an image, with its own writable=off, hidden=on, description=TEXT, "
        "max-connections=N, rotational=on, resizable=on, bitmap=NAME (repeatable), "
        "allocation-depth=on. May be repeated.",
    ),
    click.option(
        "--max-connections",
        "connections_max",
        type=click.IntRange(1, 2**31 - 1),
        default=None,
        metavar="N",
        help="Clients of each image's export at once.  [default: the limit export-connections]",
    ),
    click.option(
        "--rotational",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Whether clients are told that seeks are slow; auto asks the host's kernel.",
    ),
    click.option("--resizable", is_flag=True, help="Let clients change the size (NBD_CMD_RESIZE)."),
    click.option(
        "--bitmap",
        "bitmaps",
        multiple=True,
        metavar="NAME",
        help="Let clients ask what is dirty in this bitmap of each image or its backing chain "
        "(qemu:dirty-bitmap:NAME). May be repeated.",
    ),
    click.option(
        "--allocation-depth",
        "-A",
        is_flag=True,
        help="Let clients ask which image of the backing chain data is in (qemu:allocation-depth).",
    ),
    click.option("--read-only", "-r", is_flag=True, help="Open the images for reading only."),
)
"""--name, --description, --default, --hidden, --export, --max-connections, --rotational,
--resizable, --bitmap, --allocation-depth, --read-only, handed in as `exports`."""
