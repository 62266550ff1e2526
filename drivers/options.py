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

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)
_SUFFIX_BITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_REQUIRED = object()


def parse_size(text: str) -> int:
    """`1048576`, `64k`, `1.5G`: bytes, with binary suffixes b k m g t p e in either case.

    Raises: ValueError, with a sentence.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a size such as 512, 64k or 10G")
    number, suffix = match.groups()
    factor = 1 << _SUFFIX_BITS[suffix.lower()]
    size = int(number) * factor if number.isdigit() else int(float(number) * factor)
    if size > 2**63 - 1:
        raise ValueError(f"'{text}' is more than the largest size, 2^63 - 1 bytes")
    return size


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
