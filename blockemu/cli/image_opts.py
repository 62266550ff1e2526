# SPDX-License-Identifier: Apache-2.0
"""`--object` and `--image-opts` of commands that open images.

`--image-opts driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=sec0` says in one argument
which file, its format and options of the format's node. The command is handed the path and the
format, as if they had been typed; the options wait for the session (img/session_objects.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockemu.cli.failure import report
from blockemu.img.options import split_commas

if TYPE_CHECKING:
    from blockemu.img.session_objects import SessionObjects

F = TypeVar("F", bound=Callable[..., Any])

WITH_TARGET = "filenames"
"""The argument whose last word is a target, always a path."""

_KEY = "blockemu.session_objects"


def object_option(function: F) -> F:
    """--object: secrets for images; the function isn't handed it."""
    option = click.option(
        "--object",
        multiple=True,
        metavar="TYPE,id=ID,...",
        expose_value=False,
        callback=_add_objects,
        help="An object, so far a secret: secret,id=NAME,file=PATH[,format=base64].",
    )
    return option(function)


def image_opts_option(*arguments: str) -> Callable[[F], F]:
    """--image-opts, for these arguments; the function is handed paths, and `fmt`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(**values: Any) -> Any:
            if values.pop("image_opts"):
                _replace_arguments(arguments, values)
            return function(**values)

        option = click.option(
            "--image-opts",
            is_flag=True,
            help="The image is described by options: driver=FORMAT,file.filename=PATH,... "
            "instead of a path.",
        )
        return option(wrapper)  # type: ignore[return-value]

    return decorate


def enter_objects(context: click.Context) -> SessionObjects:
    """The objects of this command, whose sessions see them until it ends."""
    from blockemu.img.session_objects import new_session_objects

    root = context.find_root()
    if _KEY not in root.meta:
        root.meta[_KEY] = root.with_resource(new_session_objects())
    found: SessionObjects = root.meta[_KEY]
    return found


def _add_objects(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> None:
    if not texts:
        return
    from blockemu.objects import add_command_line_object

    objects = enter_objects(context)
    for text in texts:
        add_command_line_object(objects.secrets, text, warn=lambda line: report(f"warning: {line}"))


def _replace_arguments(arguments: tuple[str, ...], values: dict[str, Any]) -> None:
    if values.get("fmt") is not None:
        raise click.UsageError("--image-opts goes without --format.")
    objects = enter_objects(click.get_current_context())
    formats = set()
    for argument in arguments:
        value = values[argument]
        many = isinstance(value, tuple)
        kept = value[-1:] if argument == WITH_TARGET else ()
        texts = value[: len(value) - len(kept)] if many else (value,)
        paths = []
        for text in texts:
            path, fmt, options = parse_image_opts(text)
            paths.append(path)
            formats.add(fmt)
            objects.node_options[path] = options
        values[argument] = (*paths, *kept) if many else paths[0]
    if len(formats) > 1:
        raise click.UsageError("--image-opts: all images must be of one driver.")
    values["fmt"] = formats.pop()


def parse_image_opts(text: str) -> tuple[str, str | None, dict[str, Any]]:
    """`(path, format or None, options of the format's node)`.

    Raises: click.UsageError.
    """
    tree: dict[str, Any] = {}
    for part in split_commas(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise click.UsageError(f"--image-opts: '{key}' needs a value.")
        *outer, last = key.split(".")
        inner = tree
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise click.UsageError(f"--image-opts: '{key}' contradicts '{name}'.")
        inner[last] = value
    file = tree.pop("file", {})
    if not isinstance(file, dict) or "filename" not in file:
        raise click.UsageError("--image-opts: file.filename is missing.")
    path = file.pop("filename")
    if file.pop("driver", "file") != "file":
        raise click.UsageError("--image-opts: file.driver is 'file' here.")
    if file:
        tree["file"] = file
    driver = tree.pop("driver", None)
    return path, driver, tree
