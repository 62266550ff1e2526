# SPDX-License-Identifier: Apache-2.0
"""`blockemu img bitmap`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blockemu.cli.image_options import format_option
from blockemu.cli.sizes import read_size
from blockemu.cli.verbosity import verbose_option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Asked = list[tuple[str, str]]

EPILOG = """
What is asked for is done in the order in which it is written. Nobody else may use FILE meanwhile.

\b
Examples:
  blockemu img bitmap --add -g 64k disk.qcow2 since-monday
  blockemu img bitmap --disable disk.qcow2 since-monday
  blockemu img bitmap --add --merge since-monday -b base.qcow2 -F qcow2 disk.qcow2 all
  blockemu img bitmap --remove disk.qcow2 since-monday
"""

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


class _InOrder(click.Command):
    """Notes the actions as they stand on the command line, which click itself forgets."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        parser = self.make_parser(ctx)
        values, _, order = parser.parse_args(args=list(args))
        taken: dict[str, int] = {}
        asked: Asked = []
        for parameter in order:
            name = parameter.name or ""
            if name in _ACTIONS:
                at = taken[name] = taken.get(name, -1) + 1
                asked.append((name, values[name][at] if name == "merge" else ""))
        ctx.meta["asked"] = asked
        return super().parse_args(ctx, args)


def _action(name: str, explanation: str) -> Callable[[Any], Any]:
    return click.option(f"--{name}", name, count=True, help=explanation)


@click.command(cls=_InOrder, epilog=EPILOG)
@_action("add", "Make the bitmap, clean; it records all that is written to the disk.")
@_action("remove", "Delete it.")
@_action("clear", "Make it clean.")
@_action("enable", "Have it record from now on.")
@_action("disable", "Have it record no more.")
@click.option(
    "--merge",
    multiple=True,
    metavar="SOURCE",
    help="Make dirty what is dirty in the bitmap SOURCE.",
)
@click.option("-b", "--source-file", metavar="FILE", help="The image that has SOURCE.")
@click.option("-F", "--source-format", metavar="FORMAT", help="Its format.")
@click.option(
    "-g",
    "--granularity",
    metavar="SIZE",
    callback=read_size,
    help="With --add: how much of the disk a bit stands for: a power of two from 512 to 2G.  "
    "[default: the cluster size, within 4k and 64k]",
)
@format_option
@click.argument("filename", metavar="FILE")
@click.argument("bitmap_name", metavar="BITMAP")
@click.help_option("-h", "--help")
@verbose_option
@click.pass_context
def bitmap(
    invocation: click.Context,
    /,
    source_file: str | None,
    source_format: str | None,
    granularity: int | None,
    fmt: str | None,
    filename: str,
    bitmap_name: str,
    **actions: int | Sequence[str],
) -> None:
    """Add, remove or change BITMAP, a persistent dirty bitmap of the qcow2 image FILE."""
    from blockemu.img.bitmap import Action, BitmapRequest, Verb, change_bitmap

    del actions  # they are in `meta`, in their order
    request = BitmapRequest(
        path=filename,
        bitmap=bitmap_name,
        actions=[Action(Verb(name), source) for name, source in invocation.meta["asked"]],
        fmt=fmt,
        granularity=granularity,
        source_path=source_file,
        source_fmt=source_format,
    )
    change_bitmap(request)
