# SPDX-License-Identifier: Apache-2.0
"""A group of commands of which one is meant where the first word names none of them."""

from __future__ import annotations

import click

from blockemu.cli.lazy_group import LazyGroup


class DefaultGroup(LazyGroup):
    """`default` is the name of that command. The first word alone decides."""

    default: str

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.places, *ctx.help_option_names, "-h"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)
