# SPDX-License-Identifier: Apache-2.0
"""A group of commands, each imported when it is called, or when all are listed.

Building click's options takes longer than most commands run.
"""

from __future__ import annotations

from importlib import import_module

import click


class LazyGroup(click.Group):
    """`places`: name -> "module:attribute" of its command. Those that are added by `add_command`
    are there, too."""

    places: dict[str, str]

    @classmethod
    def of(cls, places: dict[str, str]) -> type[LazyGroup]:
        """The class of a group with these commands."""
        return type("LazyGroupOf", (cls,), {"places": places})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.places, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = self.places.get(cmd_name)
        if place is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command
