# SPDX-License-Identifier: Apache-2.0
"""Limits as users write them: `connections=100`, `negotiation-time=5s`, `option-length=64K`.

A limit's name is its field's (limits.py) with dashes, without the `max` that all of them are and
without the unit, which stands in the value instead: times in seconds or with one of ns, us, ms, s
and m, bytes with one of qemu-img's suffixes, all else a plain number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from blockemu.drivers.options import parse_size
from blockemu.errors import DaemonError
from blockemu.limits import Limits

_UNITS_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "": 10**9, "m": 60 * 10**9}
_DURATION = re.compile(r"(\d{1,15})(?:\.(\d{1,9}))?(ns|us|ms|s|m|)")

NUMBER_MAX = 2**31 - 1
"""What a limit may be, of those that are counted: C keeps them in 32 bits, with a sign."""

BYTES_MAX = 2**40
"""The same for bytes: no machine has more for its clients."""

DURATION_MAX_NS = 24 * 3600 * 10**9
"""The same for times. One that is longer than a day is a mistake of units."""


def limit_names() -> dict[str, str]:
    """Each limit's field by the name that users write."""
    return {_name_of(field.name): field.name for field in dataclasses.fields(Limits)}


def describe_limits() -> str:
    """All names with their defaults, as a user would write them."""
    defaults = Limits()
    return ", ".join(
        f"{name}={_format(field, getattr(defaults, field))}"
        for name, field in limit_names().items()
    )


def parse_limits(texts: Iterable[str], base: Limits | None = None) -> Limits:
    """`base` with what the NAME=VALUE `texts` say. Raises: DaemonError, naming the text."""
    names = limit_names()
    values: dict[str, int] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in names:
            raise DaemonError(f"limit '{name}'", f"unknown; there are {', '.join(names)}")
        if not equals:
            raise DaemonError(f"limit '{name}'", f"lacks its value: {name}=VALUE")
        try:
            values[names[name]] = _parse(names[name], value)
        except ValueError as error:
            raise DaemonError(f"limit '{name}'", str(error)) from None
    try:
        return dataclasses.replace(base or Limits(), **values)
    except ValueError as error:
        raise DaemonError("limits", str(error)) from None


def _name_of(field: str) -> str:
    return "-".join(part for part in field.split("_") if part not in ("max", "ns"))


def _is_bytes(field: str) -> bool:
    return "bytes" in field or "length" in field


def _parse(field: str, text: str) -> int:
    """Raises: ValueError, with a sentence."""
    if field.endswith("_ns"):
        return _parse_duration(text)
    if _is_bytes(field):
        value, value_max = parse_size(text), BYTES_MAX
    elif re.fullmatch(r"[0-9]{1,12}", text):
        value, value_max = int(text), NUMBER_MAX
    else:
        raise ValueError(f"'{text}' is not a number")
    if not 1 <= value <= value_max:
        raise ValueError(f"{text} is not between 1 and {value_max}")
    return value


def _parse_duration(text: str) -> int:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(f"'{text}' is not a time: a number of seconds, or with ns, us, ms, s or m")
    scale = _UNITS_NS[found[3]]
    fraction_digits = found[2] or "0"
    fraction_ns = int(fraction_digits) * scale // int("1" + "0" * len(fraction_digits))
    value_ns = int(found[1]) * scale + fraction_ns
    if not 1 <= value_ns <= DURATION_MAX_NS:
        raise ValueError(f"{text} is not between 1ns and 24 hours")
    return value_ns


def _format(field: str, value: int) -> str:
    if field.endswith("_ns"):
        return f"{value / 10**9:g}s"
    if _is_bytes(field):
        for suffix, scale in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
            if value % scale == 0:
                return f"{value // scale}{suffix}"
    return str(value)
