# SPDX-License-Identifier: Apache-2.0
"""Which threads serve, and how they wait: the options of commands that serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from blockemu.cli.option_group import option_group

if TYPE_CHECKING:
    from blockemu.loop.poller import PollParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadOptions:
    """`names`: none, one for all images, or one for each."""

    names: tuple[str, ...]
    poll_params: PollParams


def _threads(
    iothreads: tuple[str, ...], poll_max_ns: int | None, poll_grow: int, poll_shrink: int
) -> ThreadOptions:
    from blockemu.loop.iothread import default_poll_params
    from blockemu.loop.poller import PollParams

    max_ns = default_poll_params().max_ns if poll_max_ns is None else poll_max_ns
    params = PollParams(max_ns=max_ns, grow=poll_grow, shrink=poll_shrink)
    return ThreadOptions(names=iothreads, poll_params=params)


thread_options = option_group(
    "threads",
    _threads,
    click.option(
        "--iothread",
        "iothreads",
        multiple=True,
        metavar="NAME",
        help="Run all exports on one thread of this name; or, repeated once for each image, "
        "each on the one named.",
    ),
    click.option(
        "--poll-max-ns",
        type=click.IntRange(0, 10**9),
        default=None,
        metavar="NS",
        help="Let a thread without work look for some for up to so many nanoseconds before it "
        "sleeps: shorter latency for more CPU time.  [default: 100000; 0 on one core]",
    ),
    click.option(
        "--poll-grow",
        type=click.IntRange(0, 1000),
        default=0,
        metavar="FACTOR",
        help="By how much that time grows while work comes within it; 0 is 2.",
    ),
    click.option(
        "--poll-shrink",
        type=click.IntRange(0, 1000),
        default=0,
        metavar="DIVISOR",
        help="By how much it shrinks when work comes later; 0 begins anew.",
    ),
)
"""--iothread, --poll-max-ns, --poll-grow, --poll-shrink, handed in as `threads`."""
