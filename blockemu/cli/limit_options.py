# SPDX-License-Identifier: Apache-2.0
"""What clients may cost: the options of commands that serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blockemu.cli.option_group import option_group

if TYPE_CHECKING:
    from blockemu.limits import Limits


def _limits(limit_texts: tuple[str, ...]) -> Limits:
    from blockemu.limit_settings import parse_limits

    return parse_limits(limit_texts)


def _print_limits(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from blockemu.limit_settings import describe_limits

    click.echo(describe_limits().replace(", ", "\n"))
    context.exit()


limit_options = option_group(
    "limits",
    _limits,
    click.option(
        "--limit",
        "limit_texts",
        multiple=True,
        metavar="NAME=VALUE",
        help="What clients may cost, such as connections=100 or negotiation-time=5s; may be "
        "repeated. --limits lists all.",
    ),
    click.option(
        "--limits",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_limits,
        help="Print every limit with its default, and exit.",
    ),
)
"""--limit, handed in as `limits`; and --limits."""
