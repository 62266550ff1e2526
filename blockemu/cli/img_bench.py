# SPDX-License-Identifier: Apache-2.0
"""`blockemu img bench`."""

from __future__ import annotations

import click

from blockemu.cli.image_options import force_share_option, image_opts_option, quiet_option
from blockemu.cli.object_option import object_option
from blockemu.cli.sizes import read_size
from blockemu.cli.verbosity import verbose_option

EPILOG = """
\b
Examples:
  blockemu img bench -f raw disk.raw
  blockemu img bench -w -c 10000 -d 32 -t none -i native --pattern 85 -f qcow2 disk.qcow2
"""


@click.command(epilog=EPILOG)
@click.option(
    "-c", "--count", type=click.IntRange(0), default=75000, show_default=True,
    help="How many requests.",
)  # fmt: skip
@click.option(
    "-d", "--depth", type=click.IntRange(1, 4096), default=64, show_default=True,
    help="How many of them in parallel.",
)  # fmt: skip
@click.option("-f", "--format", "fmt", metavar="FORMAT", help="Format of FILE: raw or qcow2.")
@click.option(
    "-s", "--buffer-size", "buffer_bytes", metavar="SIZE", callback=read_size, default="4k",
    show_default=True, help="Bytes of each request.",
)  # fmt: skip
@click.option(
    "-S", "--step-size", "step_bytes", metavar="SIZE", callback=read_size,
    help="How far a request is from the one before it.  [default: the buffer's size]",
)  # fmt: skip
@click.option(
    "-o", "--offset", "start", metavar="OFFSET", callback=read_size, default="0",
    help="Where the first request begins.",
)  # fmt: skip
@click.option("-w", "--write", is_flag=True, help="Write. What FILE holds is lost.")
@click.option(
    "--pattern", type=click.IntRange(0, 255), default=0, show_default=True,
    help="The byte that is written.",
)  # fmt: skip
@click.option(
    "--flush-interval", type=click.IntRange(0), default=0, metavar="N",
    help="With -w: wait for all requests and flush, each time that N more are done.",
)  # fmt: skip
@click.option("--no-drain", is_flag=True, help="Flush without waiting for the other requests.")
@click.option(
    "-t", "cache", type=click.Choice(["none", "writeback", "unsafe"]), default="writeback",
    show_default=True, help="How I/O goes through the host's cache; none goes past it (O_DIRECT).",
)  # fmt: skip
@click.option(
    "-i", "--aio", type=click.Choice(["threads", "native"]), default="threads", show_default=True,
    help="Who does the host's I/O: threads, or Linux AIO (with -t none).",
)  # fmt: skip
@click.option("-n", "--native", is_flag=True, help="The same as -i native.")
@quiet_option
@force_share_option
@click.argument("filename", metavar="FILE")
@object_option
@click.help_option("-h", "--help")
@verbose_option
@image_opts_option("filename")
def bench(
    count: int,
    depth: int,
    fmt: str | None,
    buffer_bytes: int,
    step_bytes: int | None,
    start: int,
    write: bool,
    pattern: int,
    flush_interval: int,
    no_drain: bool,
    cache: str,
    aio: str,
    native: bool,
    quiet: bool,
    force_share: bool,
    filename: str,
) -> None:
    """Read (or write) the disk image FILE from its start on, and tell how long it took."""
    from blockemu.img.bench import BenchRequest, run_bench

    if write and force_share:
        raise click.UsageError("-U goes without -w.")
    request = BenchRequest(
        path=filename,
        fmt=fmt,
        count=count,
        depth=depth,
        buffer_bytes=buffer_bytes,
        step_bytes=step_bytes,
        start=start,
        write=write,
        pattern=pattern,
        flush_interval=flush_interval,
        drain=not no_drain,
        cache=cache,
        aio="native" if native else aio,
        force_share=force_share,
    )
    run_bench(request, say=lambda line: None if quiet else click.echo(line))
