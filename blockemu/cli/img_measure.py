# SPDX-License-Identifier: Apache-2.0
"""`blockemu img measure`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import force_share_option, image_opts_option, output_option
from blockemu.cli.object_option import object_option
from blockemu.cli.sizes import read_size
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img measure -O qcow2 --size 10G
  blockemu img measure --output json -O qcow2 -o cluster_size=2M -f raw disk.raw
"""


@click.command(epilog=EPILOG)
@output_option
@click.option(
    "-O",
    "--target-format",
    "target_fmt",
    default="raw",
    show_default=True,
    metavar="FORMAT",
    help="Format of the image that isn't made yet: raw or qcow2.",
)
@click.option(
    "-o",
    "--options",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Its options, as for `create`.",
)
@click.option("-f", "--format", "fmt", metavar="FORMAT", help="Format of FILE: raw or qcow2.")
@click.option(
    "--size",
    "size_bytes",
    metavar="N",
    callback=read_size,
    help="Measure a new, empty image of this size, and no copy.",
)
@force_share_option
@click.argument("filename", metavar="[FILE]", required=False)
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def measure(
    output: str,
    target_fmt: str,
    options: tuple[str, ...],
    fmt: str | None,
    size_bytes: int | None,
    force_share: bool,
    filename: str | None,
) -> None:
    """Tell how much space a copy of FILE, or an empty image, would take."""
    from blockemu.img.measure import measure_image, measure_size

    if (filename is None) == (size_bytes is None):
        raise click.UsageError("Either FILE or --size must be given, and not both.")
    if size_bytes is not None:
        found = measure_size(size_bytes, fmt=target_fmt, option_texts=options)
    else:
        assert filename is not None
        found = measure_image(
            filename, fmt=fmt, target_fmt=target_fmt, option_texts=options, force_share=force_share
        )
    click.echo(found.as_json() if output == "json" else found.as_text())
