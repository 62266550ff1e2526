# SPDX-License-Identifier: Apache-2.0
"""Taking typed values out of an option tree.

Options come from JSON (typed) or from `key=value` text (all strings), so each taker reads both.
What a driver takes is removed; what is left over at the end is refused as unknown, which is how a
typing error becomes a message and not a default.
"""

from __future__ import annotations

import re
from typing import Any

from blockemu.drivers.errors import ImageError

SIZE_MAX = 2**63 - 1
"""Offsets are signed 64-bit numbers all the way down to the kernel."""

_SUFFIXES = "BKMGTPE"
_DECIMAL = re.compile(r"\s*(\d+)(?:\.(\d*))?([BKMGTPE]?)", re.IGNORECASE | re.ASCII)
_HEXADECIMAL = re.compile(r"\s*0x([0-9a-f]+)", re.IGNORECASE | re.ASCII)
_REQUIRED = object()


def parse_size(text: str) -> int:
    """The number of bytes that `text` says, by qemu-img's rules.

    Digits, then one of B K M G T P E (powers of 1024, either case) or nothing for bytes. A fraction
    goes with a suffix other than B (`1.5G`), and what is less than a byte is cut off. Hexadecimal
    (0x...) goes without a suffix.
    Raises: ValueError, with a sentence.
    """
    if found := _HEXADECIMAL.fullmatch(text):
        size_bytes = int(found[1], 16)
    elif found := _DECIMAL.fullmatch(text):
        scale = 1024 ** _SUFFIXES.index((found[3] or "B").upper())
        fraction = found[2] or ""
        if scale == 1 and fraction.strip("0"):
            raise ValueError(f"'{text}' is not a size: there is no fraction of a byte")
        size_bytes = int(found[1]) * scale
        if fraction:
            size_bytes += int(fraction) * scale // 10 ** len(fraction)
    else:
        raise ValueError(
            f"'{text}' is not a size: a number, and one of the suffixes k, M, G, T, P and E "
            "for kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes"
        )
    if size_bytes > SIZE_MAX:
        raise ValueError(f"'{text}' is too large: a size is between 0 and {SIZE_MAX}")
    return size_bytes


def take_size(
    name: str, options: dict[str, Any], key: str, default: int | object | None = _REQUIRED
) -> Any:
    """Bytes from an int or a text that `parse_size` reads. Raises: ImageError."""
    value = _take(name, options, key, default)
    if isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as error:
            raise ImageError(name, f"option '{key}': {error}") from None
    if value is not default and (not isinstance(value, int) or isinstance(value, bool)):
        raise ImageError(name, f"option '{key}' takes a size in bytes, not {value!r}")
    if isinstance(value, int) and value < 0:
        raise ImageError(name, f"option '{key}' can't be negative ({value})")
    return value


def take_number(
    name: str,
    options: dict[str, Any],
    key: str,
    *,
    lowest: int,
    highest: int,
    default: int | object = _REQUIRED,
) -> int:
    """An int, or the digits of one. Raises: ImageError."""
    value = _take(name, options, key, default)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        reason = f"option '{key}' is a number from {lowest} to {highest}, not {value!r}"
        raise ImageError(name, reason)
    return value


def take_str(
    name: str, options: dict[str, Any], key: str, default: str | object | None = _REQUIRED
) -> Any:
    """Raises: ImageError, when missing without a default, or not a text."""
    value = _take(name, options, key, default)
    if value is not default and not isinstance(value, str):
        raise ImageError(name, f"option '{key}' takes a text, not {value!r}")
    return value


def take_choice(
    name: str, options: dict[str, Any], key: str, choices: tuple[str, ...], default: str
) -> str:
    """One of `choices`. Raises: ImageError."""
    value = _take(name, options, key, default)
    if value not in choices:
        raise ImageError(name, f"option '{key}' is one of {', '.join(choices)}, not {value!r}")
    return str(value)


def take_bool(name: str, options: dict[str, Any], key: str, *, default: bool) -> bool:
    """A JSON boolean, or on/off, yes/no, true/false. Raises: ImageError."""
    value = _take(name, options, key, default)
    if isinstance(value, bool):
        return value
    known = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
    if isinstance(value, str) and value in known:
        return known[value]
    raise ImageError(name, f"option '{key}' is on or off, not {value!r}")


def take_dict(name: str, options: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested object, or an empty one; `key.inner` entries are merged into it."""
    value = options.pop(key, {})
    if not isinstance(value, dict):
        raise ImageError(name, f"option '{key}' takes an object, not {value!r}")
    nested = dict(value)
    prefix = f"{key}."
    for flat in [flat for flat in options if flat.startswith(prefix)]:
        nested[flat.removeprefix(prefix)] = options.pop(flat)
    return nested


def refuse_unknown(name: str, options: dict[str, Any], driver: str) -> None:
    """Raises: ImageError, if anything is left."""
    if options:
        keys = ", ".join(f"'{key}'" for key in sorted(options))
        raise ImageError(name, f"driver '{driver}' has no option {keys}")


def _take(name: str, options: dict[str, Any], key: str, default: Any) -> Any:
    if key not in options:
        if default is _REQUIRED:
            raise ImageError(name, f"option '{key}' is missing")
        return default
    return options.pop(key)
