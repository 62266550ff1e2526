# SPDX-License-Identifier: Apache-2.0
"""How images are opened to be served: the options of `blockemu serve`, in its own spelling."""

from __future__ import annotations

from dataclasses import dataclass

import click

from blockemu.cli.option_group import option_group


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveOptions:
    """The same for all images of the command."""

    snapshot: str | None
    direct: bool
    aio: str
    discard: str
    detect_zeroes: str
    overlap_check: str | None


def _drive(
    snapshot: str | None,
    cache: str,
    aio: str,
    discard: str,
    detect_zeroes: str,
    overlap_check: str | None,
) -> DriveOptions:
    return DriveOptions(
        snapshot=snapshot,
        direct=cache == "direct",
        aio=aio,
        discard=discard,
        detect_zeroes=detect_zeroes,
        overlap_check=overlap_check,
    )


drive_options = option_group(
    "drive",
    _drive,
    click.option(
        "-l",
        "--load-snapshot",
        "snapshot",
        metavar="SNAPSHOT",
        help="Serve the images as they were at this internal snapshot (an id, or else a name), "
        "for reading only.",
    ),
    click.option(
        "--cache",
        type=click.Choice(["direct", "writeback"]),
        default="writeback",
        show_default=True,
        help="direct goes past the host's page cache (O_DIRECT).",
    ),
    click.option(
        "--aio",
        type=click.Choice(["native", "threads"]),
        default="native",
        show_default=True,
        help="How host I/O is done. native is Linux AIO with --cache direct; with writeback, "
        "reads that the page cache can answer are done in place, the rest by threads.",
    ),
    click.option(
        "--discard",
        type=click.Choice(["ignore", "unmap"]),
        default="unmap",
        show_default=True,
        help="unmap gives space back to the host that a client trims; ignore keeps it.",
    ),
    click.option(
        "--detect-zeroes",
        type=click.Choice(["off", "on", "unmap"]),
        default="off",
        show_default=True,
        help="on makes writes of nothing but zeroes take little time and, in qcow2, space; "
        "unmap gives their space back as well.",
    ),
    click.option(
        "--overlap-check",
        type=click.Choice(["none", "constant", "cached", "all"]),
        default=None,
        help="Which metadata of a qcow2 image is looked out for before something is written.  "
        "[default: cached]",
    ),
)
"""--load-snapshot, --cache, --aio, --discard, --detect-zeroes, --overlap-check, handed in as
`drive`."""
