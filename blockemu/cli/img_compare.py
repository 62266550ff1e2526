# SPDX-License-Identifier: Apache-2.0
"""`blockemu img compare`."""

from __future__ import annotations

import click

from blockemu.cli.failure import report
from blockemu.cli.image_options import (
    cache_option,
    force_share_option,
    image_opts_option,
    quiet_option,
)
from blockemu.cli.object_option import object_option
from blockemu.cli.progress import progress_bar, progress_option
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img compare -f raw -F qcow2 disk.raw disk.qcow2
  blockemu img compare -s a.qcow2 b.qcow2
"""


@click.command(epilog=EPILOG)
@click.option("-f", "--format", "fmt", metavar="FORMAT", help="Format of FILE1: raw or qcow2.")
@click.option(
    "-F", "--second-format", "second_fmt", metavar="FORMAT", help="Format of FILE2: raw or qcow2."
)
@click.option(
    "-s",
    "--strict",
    is_flag=True,
    help="The images must also have the same size, and be allocated alike.",
)
@cache_option("-T", "source_cache", default="writeback", what="reading")
@progress_option
@quiet_option
@force_share_option
@click.argument("filename1", metavar="FILE1")
@click.argument("filename2", metavar="FILE2")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename1", "filename2")
def compare(
    fmt: str | None,
    second_fmt: str | None,
    strict: bool,
    source_cache: str,
    progress: bool,
    quiet: bool,
    force_share: bool,
    filename1: str,
    filename2: str,
) -> int:
    """Tell whether two disk images hold the same. Exit status 0: yes, 1: no, more: an error."""
    from blockemu.drivers.errors import ImageError
    from blockemu.img.compare import CompareError, CompareRequest, Failure, compare_images

    request = CompareRequest(
        paths=(filename1, filename2),
        fmts=(fmt, second_fmt),
        strict=strict,
        cache=source_cache,
        force_share=force_share,
    )
    lines: list[str] = []
    try:
        with progress_bar(wanted=progress and not quiet) as show:
            verdict = compare_images(request, say=lines.append, progress=show)
    except ImageError as error:
        report(str(error))
        return int(error.failure if isinstance(error, CompareError) else Failure.OPEN)
    if not quiet:
        for line in lines:
            click.echo(line)
    return verdict.value
