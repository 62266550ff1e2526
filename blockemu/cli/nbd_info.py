# SPDX-License-Identifier: Apache-2.0
"""`blockemu nbd info` and `blockemu nbd list`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from blockemu.cli.failure import one_line, report
from blockemu.cli.verbosity import verbose_option

F = TypeVar("F", bound=Callable[..., Any])

BASE_ALLOCATION = "base:allocation"
STATUS_FALSE = 2
LINES_PER_WRITE = 1024

INFO_EPILOG = """
Exit status of --can and --is, which print nothing: 0 it can, 2 it can't, 1 it couldn't be found
out.

\b
Examples:
  blockemu nbd info nbd://localhost/disk
  blockemu nbd info --json 'nbd+unix:///disk?socket=/run/nbd.sock'
  blockemu nbd info --map --totals nbd://localhost/disk
  blockemu nbd info --map=qemu:dirty-bitmap:b0 nbd://localhost/disk
  blockemu nbd info --is read-only nbd://localhost/disk && echo read-only
"""

LIST_EPILOG = """
\b
Examples:
  blockemu nbd list nbd://localhost
  blockemu nbd list --json 'nbd+unix:///?socket=/run/nbd.sock'
"""


class WrongUsage(click.UsageError):
    """Wrong usage of a command whose status 2 is an answer."""

    exit_code = 1


class InfoCommand(click.Command):
    """`--map` may go without its value, and 2 is an answer: wrong usage is 1 here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [f"--map={BASE_ALLOCATION}" if word == "--map" else word for word in args]
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise WrongUsage(error.format_message(), error.ctx) from error


def json_option(function: F) -> F:
    """--json, handed in as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print it as nbdinfo --json does, for programs."
    )(function)


def no_content_option(function: F) -> F:
    """--no-content, which is always so."""
    return click.option(
        "--no-content",
        is_flag=True,
        expose_value=False,
        help="Taken for nbdinfo's sake: what an export holds is never looked at.",
    )(function)


@click.command(cls=InfoCommand, epilog=INFO_EPILOG)
@json_option
@click.option(
    "--map",
    "context",
    metavar="[=CONTEXT]",
    help=f"Show a meta context's map of the export, {BASE_ALLOCATION} unless another is named: "
    "offset, length, type, meaning.",
)
@click.option("--totals", is_flag=True, help="With --map: the bytes of each type in all.")
@click.option("--size", is_flag=True, help="Print the size in bytes and nothing else.")
@click.option(
    "--can",
    "can",
    metavar="PROPERTY",
    help="Ask for one property by the exit status: connect, read, write, cache, df, fast-zero, "
    "flush, fua, multi-conn, structured-reply, trim, zero.",
)
@click.option(
    "--is",
    "is_",
    metavar="PROPERTY",
    help="The same, for what sounds better so: read-only, rotational, tls.",
)
@no_content_option
@click.argument("uri", metavar="URI")
@click.help_option("-h", "--help")
@verbose_option
def info(
    as_json: bool,
    context: str | None,
    totals: bool,
    size: bool,
    can: str | None,
    is_: str | None,
    uri: str,
) -> int:
    """Describe the export that the NBD URI leads to, as nbdinfo does."""
    from blockemu.nbdinfo.describe import format_human, format_json, has_property, property_named
    from blockemu.nbdinfo.map import map_export, total_export
    from blockemu.nbdinfo.server import ask_export

    if sum((context is not None, size, can is not None, is_ is not None)) > 1:
        raise WrongUsage("--map, --size, --can and --is go one at a time.")
    if totals and context is None:
        raise WrongUsage("--totals goes with --map only.")
    if context is not None:
        show = total_export if totals else map_export
        with _batches() as emit:
            show(uri, context, emit, as_json=as_json)
        return 0
    asked = can or is_
    if asked is not None:
        property_named(asked)
        return 0 if has_property(ask_export(uri), asked) else STATUS_FALSE
    found = ask_export(uri)
    if size:
        click.echo(found.exports[0][0].size)
    elif as_json:
        click.echo(format_json(found))
    else:
        _print(format_human(found))
    return 0


@click.command("list", epilog=LIST_EPILOG)
@json_option
@no_content_option
@click.argument("uri", metavar="URI")
@click.help_option("-h", "--help")
@verbose_option
def list_(as_json: bool, uri: str) -> int:
    """Describe all exports of the server that the NBD URI leads to, as nbdinfo --list does.

    The name of an export in the URI is ignored. One that is listed and then refused costs a line on
    stderr, and the exit status is 1.
    """
    from blockemu.nbdinfo.describe import format_human, format_json
    from blockemu.nbdinfo.server import ask_all

    found = ask_all(uri)
    if as_json:
        click.echo(format_json(found))
    else:
        _print(format_human(found))
    for problem in found.problems:
        report(problem)
    return 1 if found.problems else 0


@contextmanager
def _batches() -> Iterator[Callable[[str], None]]:
    """Print lines, many in one write. What there is is printed even if there is no more to come."""
    lines: list[str] = []

    def emit(line: str) -> None:
        lines.append(line)
        if len(lines) >= LINES_PER_WRITE:
            click.echo("\n".join(lines))
            lines.clear()

    try:
        yield emit
    finally:
        if lines:
            click.echo("\n".join(lines))


def _print(lines: list[str]) -> None:
    for line in lines:
        click.echo(one_line(line))
