# SPDX-License-Identifier: Apache-2.0
"""Sizes on the command line."""

from __future__ import annotations

import click


def read_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """An option's callback: bytes, from a number with one of the suffixes k, M, G, T, P and E.

    Raises: click.BadParameter, with the reason.
    """
    from blockemu.drivers.options import parse_size

    if value is None:
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None
