# SPDX-License-Identifier: Apache-2.0
"""`-v`: how much a command says on stderr. Before or after the subcommand; twice is more."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
"""By the number of -v."""


@dataclass(slots=True)
class CliState:
    """What the whole command line shares: made in main(), reaches commands as click's `obj`."""

    verbosity: int = 0
    owns_process: bool = False
    """This is the console script, so settings of the whole process are ours to change."""
    kept: object = None
    """What must live until the process exits."""


def _count(context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value:
        state = context.ensure_object(CliState)
        state.verbosity += value
        configure_logging(state.verbosity)
    return value


def verbose_option(function: F) -> F:
    """Adds -v to a command; the function isn't handed it."""
    option = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_count,
        help="Log more to stderr, and show tracebacks of bugs; -vv logs everything.",
    )
    return option(function)


def configure_logging(verbosity: int) -> None:
    """Send this process's log to stderr, a line a record."""
    level = LEVELS[min(verbosity, len(LEVELS) - 1)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(threadName)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
