# SPDX-License-Identifier: Apache-2.0
"""`-p`: a progress bar, where there is a terminal to draw it on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

F = TypeVar("F", bound=Callable[..., Any])

Progress = Callable[[int, int], None]
"""Told (what is done, what there is in all), in bytes."""


def progress_option(function: F) -> F:
    """-p, handed in as `progress`."""
    return click.option(
        "-p",
        "--progress",
        is_flag=True,
        help="Draw a progress bar on stderr, if that is a terminal.",
    )(function)


@contextmanager
def progress_bar(*, wanted: bool) -> Iterator[Progress]:
    """Inside, what is yielded draws how far it is told that things are; or does nothing."""
    if not wanted or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with ExitStack() as stack:
        bars: list[ProgressBar[int]] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bar: ProgressBar[int] = click.progressbar(length=total, file=sys.stderr)
                bars.append(stack.enter_context(bar))
            bars[0].length = total
            bars[0].update(done - bars[0].pos)

        yield show
