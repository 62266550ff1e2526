# SPDX-License-Identifier: Apache-2.0
"""Options that several img subcommands have, spelled as qemu-img spells them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])

CACHE_MODES = ("none", "writeback", "unsafe", "directsync", "writethrough")


def format_option(function: F) -> F:
    """-f, handed in as `fmt`."""
    return click.option(
        "-f",
        "--format",
        "fmt",
        metavar="FORMAT",
        help="Format of the image: raw or qcow2; without it, it is found out.",
    )(function)


def output_option(function: F) -> F:
    """--output human|json, handed in as `output`."""
    return click.option(
        "--output",
        type=click.Choice(["human", "json"]),
        default="human",
        show_default=True,
        help="How to print it.",
    )(function)


def force_share_option(function: F) -> F:
    """-U, handed in as `force_share`."""
    return click.option(
        "-U",
        "--force-share",
        is_flag=True,
        help="Read images that another process is writing; what is read may be stale.",
    )(function)


def quiet_option(function: F) -> F:
    """-q, handed in as `quiet`."""
    return click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")(function)


WITH_TARGET = "filenames"
"""The parameter whose last name is a target's, which stays a name."""


def image_opts_option(*parameters: str) -> Callable[[F], F]:
    """--image-opts: the image names in `parameters` are options. The innermost decorator."""

    def decorate(function: F) -> F:
        @wraps(function)
        def with_names(*args: Any, image_opts: bool, **values: Any) -> Any:
            if image_opts:
                if values.get("fmt") is not None:
                    raise click.UsageError("--image-opts and --format are mutually exclusive.")
                for parameter in parameters:
                    values[parameter] = _names(parameter, values[parameter])
            return function(*args, **values)

        return click.option(
            "--image-opts",
            is_flag=True,
            help="The image is given as KEY=VALUE,..., such as driver=qcow2,file.filename=X.",
        )(cast("F", with_names))

    return decorate


def _names(parameter: str, value: Any) -> Any:
    """The `json:` names of options."""
    from blockemu.drivers.filename import name_of_image_opts

    if isinstance(value, str):
        return name_of_image_opts(value)
    if isinstance(value, tuple):
        kept = value[-1:] if parameter == WITH_TARGET else ()
        return (*(name_of_image_opts(text) for text in value[: len(value) - len(kept)]), *kept)
    return value


def cache_option(name: str, parameter: str, *, default: str, what: str) -> Callable[[F], F]:
    """-t or -T, handed in as `parameter`."""
    return click.option(
        name,
        parameter,
        type=click.Choice(CACHE_MODES),
        default=default,
        show_default=True,
        help=f"How {what} goes through the host's cache; none goes past it (O_DIRECT).",
    )
