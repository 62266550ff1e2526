# SPDX-License-Identifier: Apache-2.0
"""Options of one theme, which several commands have, handed in as one value.

A group is a list of click options and a function that takes their values by name and makes one
value of them. The commands that use it neither list the options nor know them one by one:

    listener_options = option_group("addresses", _addresses, click.option("--socket", ...), ...)

    @click.command()
    @listener_options
    def serve(addresses: tuple[Address, ...]) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def option_group(
    parameter: str, collect: Callable[..., Any], *options: Callable[[Any], Any]
) -> Callable[[F], F]:
    """A decorator: `options`, whose values `collect` turns into what is handed in as `parameter`.

    The parameters of `collect` name the options' values. It raises what the command may raise.
    """
    names = tuple(inspect.signature(collect).parameters)

    def decorate(function: F) -> F:
        @wraps(function)
        def collected(*args: Any, **values: Any) -> Any:
            own = {name: values.pop(name) for name in names}
            return function(*args, **{parameter: collect(**own)}, **values)

        decorated: Any = collected
        for option in reversed(options):
            decorated = option(decorated)
        made: F = decorated
        return made

    return decorate
