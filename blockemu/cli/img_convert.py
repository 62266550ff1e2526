# SPDX-License-Identifier: Apache-2.0
"""`blockemu img convert`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import (
    cache_option,
    force_share_option,
    image_opts_option,
    quiet_option,
)
from blockemu.cli.object_option import object_option
from blockemu.cli.progress import progress_bar, progress_option
from blockemu.cli.sizes import read_size
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img convert -f raw -O qcow2 disk.raw disk.qcow2
  blockemu img convert -p -f qcow2 -O raw -S 64k disk.qcow2 disk.raw
  blockemu img convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw disk.qcow2
  blockemu img convert -l before-upgrade -f qcow2 -O qcow2 disk.qcow2 then.qcow2
  blockemu img convert -n -W -f qcow2 -O raw disk.qcow2 /dev/vg/disk
"""


@click.command(epilog=EPILOG)
@click.option("-f", "--format", "fmt", metavar="FORMAT", help="Format of the sources.")
@click.option(
    "-O",
    "--target-format",
    "target_fmt",
    default="raw",
    show_default=True,
    metavar="FORMAT",
    help="Format of DST: raw or qcow2.",
)
@click.option(
    "-o",
    "--options",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Options of the new image; `-o help` (or `-o ?`) lists them.",
)
@click.option(
    "-B",
    "-b",
    "--backing",
    metavar="FILE",
    help="Backing file of DST, which shows what the backing file of SRC does: only what lies "
    "above that is copied.",
)
@click.option("-F", "--backing-format", metavar="FORMAT", help="Format of the backing file.")
@click.option("-n", "--existing", is_flag=True, help="DST is there already: write into it.")
@click.option("--target-is-zero", is_flag=True, help="With -n: all of DST reads as zeroes now.")
@click.option(
    "-S",
    "--sparse-size",
    "sparse_bytes",
    metavar="SIZE",
    callback=read_size,
    default="4k",
    show_default=True,
    help="Leave out runs of so many zero bytes; 0 writes everything, zeroes too.",
)
@click.option(
    "-m",
    "--coroutines",
    "requests_max",
    type=click.IntRange(1, 16),
    default=8,
    show_default=True,
    help="How many pieces are under way at once.",
)
@click.option(
    "-l",
    "--snapshot",
    metavar="SNAPSHOT",
    help="Copy SRC as it was at this internal snapshot (an id, or else a name).",
)
@click.option(
    "--salvage", is_flag=True, help="Go on where SRC can't be read: DST gets zeroes there."
)
@click.option("-c", "--compress", is_flag=True, help="Store clusters of DST compressed (qcow2).")
@click.option("--bitmaps", is_flag=True, help="Copy the persistent dirty bitmaps of SRC, too.")
@click.option(
    "--skip-broken-bitmaps", is_flag=True, help="With --bitmaps: leave out inconsistent ones."
)
@click.option("-W", "--out-of-order", is_flag=True, help="Write pieces in any order.")
@cache_option("-t", "target_cache", default="unsafe", what="writing")
@cache_option("-T", "source_cache", default="writeback", what="reading")
@progress_option
@quiet_option
@force_share_option
@click.argument("filenames", metavar="SRC... DST", nargs=-1, required=True)
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filenames")
def convert(
    fmt: str | None,
    target_fmt: str,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    existing: bool,
    target_is_zero: bool,
    sparse_bytes: int,
    requests_max: int,
    snapshot: str | None,
    salvage: bool,
    compress: bool,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
    out_of_order: bool,
    target_cache: str,
    source_cache: str,
    progress: bool,
    quiet: bool,
    force_share: bool,
    filenames: tuple[str, ...],
) -> None:
    """Copy the disk images SRC, one behind the other, into the disk image DST."""
    from blockemu.cli.failure import report
    from blockemu.img.convert import ConvertRequest, convert_images
    from blockemu.img.options import help_wanted, options_help

    if any(help_wanted(text) for text in options):
        click.echo(options_help(target_fmt))
        return
    *sources, target = filenames
    if not sources:
        raise click.UsageError("Missing argument 'DST'.")
    request = ConvertRequest(
        sources=sources,
        target=target,
        source_fmt=fmt,
        snapshot=snapshot,
        salvage=salvage,
        target_fmt=target_fmt,
        option_texts=options,
        backing_file=backing,
        backing_fmt=backing_format,
        existing=existing,
        target_is_zero=target_is_zero,
        sparse_bytes=sparse_bytes,
        requests_max=requests_max,
        in_order=not out_of_order,
        compressed=compress,
        bitmaps=bitmaps,
        skip_broken_bitmaps=skip_broken_bitmaps,
        source_cache=source_cache,
        target_cache=target_cache,
        force_share=force_share,
    )

    def warn(text: str) -> None:
        if not quiet:
            report(f"warning: {text}")

    with progress_bar(wanted=progress and not quiet) as show:
        convert_images(request, progress=show, warn=warn)
