# SPDX-License-Identifier: Apache-2.0
"""`blockemu img check`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import format_option, image_opts_option, output_option, quiet_option
from blockemu.cli.object_option import object_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
Exit status: 0 clean; 1 the check couldn't be done; 2 corruptions; 3 leaks only; 63 the format has
nothing to check (raw). After a repair, it tells what remains.

\b
Examples:
  blockemu img check disk.qcow2
  blockemu img check -r leaks disk.qcow2
  blockemu img check --output json -U disk.qcow2
"""


@click.command(epilog=EPILOG)
@format_option
@output_option
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="`leaks` frees space that nothing uses; `all` also makes refcounts and flags right. "
    "What `all` believes is the tables, so keep a copy of an image that matters.",
)
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="Look at an image that another process is writing; what is found may be on its way.",
)
@quiet_option
@click.argument("filename", metavar="FILE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def check(
    fmt: str | None,
    output: str,
    repair: str | None,
    force_share: bool,
    quiet: bool,
    filename: str,
) -> int:
    """Check the metadata of the disk image FILE, and repair it."""
    from blockemu.cli.failure import one_line, report
    from blockemu.drivers.qcow2.repair import Repair
    from blockemu.img.check import (
        STATUS_NO_CHECK,
        FormatHasNoCheck,
        format_human,
        format_json,
        read_check,
    )

    try:
        found = read_check(
            filename,
            fmt=fmt,
            repair=Repair(repair) if repair is not None else None,
            force_share=force_share,
            say=lambda line: click.echo(one_line(line), err=True),
        )
    except FormatHasNoCheck as error:
        report(str(error))
        return STATUS_NO_CHECK
    if not quiet:
        click.echo(format_json(found) if output == "json" else format_human(found))
    return found.status
