# SPDX-License-Identifier: Apache-2.0
"""`--object` of commands that open images: secrets, TLS credentials and who may come in, which wait
for the session that needs them (img/session_objects.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockemu.cli.failure import report

if TYPE_CHECKING:
    from blockemu.drivers.crypto.user_objects import UserObjects

F = TypeVar("F", bound=Callable[..., Any])

_KEY = "blockemu.session_objects"


def object_option(function: F) -> F:
    """--object: what others name by an id; the function isn't handed it."""
    option = click.option(
        "--object",
        multiple=True,
        metavar="TYPE,id=ID,...",
        expose_value=False,
        callback=_add_objects,
        help="An object: secret,id=NAME,file=PATH[,format=base64], or TLS credentials: "
        "tls-creds-x509,id=NAME,dir=PATH,endpoint=client.",
    )
    return option(function)


def enter_objects(context: click.Context) -> UserObjects:
    """The objects of this command, whose sessions see them until it ends."""
    from blockemu.img.session_objects import new_session_objects

    root = context.find_root()
    if _KEY not in root.meta:
        root.meta[_KEY] = root.with_resource(new_session_objects())
    found: UserObjects = root.meta[_KEY]
    return found


def _add_objects(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> None:
    if not texts:
        return
    from blockemu.objects import add_command_line_objects

    objects = enter_objects(context)
    add_command_line_objects(objects, texts, warn=lambda line: report(f"warning: {line}"))
