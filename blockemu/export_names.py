# SPDX-License-Identifier: Apache-2.0
"""The exports that a command line asks for: names for images, and further names for their nodes.

`--export name=NAME,of=EXPORT,...` is one more way to a node that is served already, under its own
name and with its own rights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import is_json, local_path, parse_filename
from blockemu.errors import DaemonError
from blockemu.exports import ExportSpec
from blockemu.limits import Limits

_BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_KEYS = (
    "name",
    "of",
    "writable",
    "hidden",
    "description",
    "max-connections",
    "rotational",
    "resizable",
    "bitmap",
    "allocation-depth",
)
_REPEATABLE = "bitmap"


@dataclass(frozen=True, slots=True)
class AliasConfig:
    """One more export of the node that the export named `of` has."""

    of: str
    spec: ExportSpec


def export_names(paths: Sequence[str], names: Sequence[str], limits: Limits) -> list[str]:
    """Given names in the order of the images; for those that have none, a file's stem, or the name
    that an export has where it comes from. Raises: DaemonError."""
    if len(names) > len(paths):
        raise DaemonError(names[len(paths)], "there are more --name options than images")
    found: dict[str, str] = {}
    for index, path in enumerate(paths):
        name = names[index] if index < len(names) else _name_of(path)
        if name in found:
            raise DaemonError(
                path, f"export name '{name}' is taken by {found[name]}; give each its own --name"
            )
        check_name(path, name, limits)
        found[name] = path
    return list(found)


def check_name(what: str, name: str, limits: Limits) -> None:
    """Whether clients can ask for `name`. Raises: DaemonError."""
    if _utf8_length(what, "export name", name, "; give it a --name") > limits.name_length_max:
        raise DaemonError(what, f"an export name has at most {limits.name_length_max} bytes")


def check_description(what: str, description: str, limits: Limits) -> None:
    """Whether clients can be told `description`. Raises: DaemonError."""
    if _utf8_length(what, "description", description, "") > limits.name_length_max:
        raise DaemonError(what, f"a description has at most {limits.name_length_max} bytes")


def _utf8_length(what: str, kind: str, text: str, advice: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        reason = f"its {kind} isn't UTF-8, which the protocol wants{advice}"
        raise DaemonError(what, reason) from None


def parse_alias(text: str, limits: Limits) -> AliasConfig:
    """`name=NAME,of=EXPORT[,key=value]...`; commas in values are doubled, and `bitmap` may be
    repeated. Raises: DaemonError."""
    what = f"--export {text}"
    values: dict[str, str] = {}
    bitmaps: list[str] = []
    for part in (piece.replace("\0", ",") for piece in text.replace(",,", "\0").split(",")):
        key, equals, value = part.partition("=")
        if key not in _KEYS:
            raise DaemonError(what, f"there is no '{key}'; known: {', '.join(_KEYS)}")
        if not equals:
            raise DaemonError(what, f"'{key}' needs a value: {key}=...")
        if key == _REPEATABLE:
            if not value:
                raise DaemonError(what, "'bitmap' needs the name of one")
            bitmaps.append(value)
            continue
        if key in values:
            raise DaemonError(what, f"'{key}' is given twice")
        values[key] = value
    for key in ("name", "of"):
        if key not in values:
            raise DaemonError(what, f"lacks '{key}': name=NAME,of=EXPORT")
    check_name(what, values["name"], limits)
    check_description(what, values.get("description", ""), limits)
    spec = ExportSpec(
        name=values["name"],
        writable=_bool(what, values, "writable", default=True),
        hidden=_bool(what, values, "hidden", default=False),
        description=values.get("description", ""),
        connections_max=_count(what, values.get("max-connections")),
        rotational=_bool(what, values, "rotational", default=False)
        if "rotational" in values
        else None,
        resizable=_bool(what, values, "resizable", default=False),
        bitmaps=tuple(bitmaps),
        allocation_depth=_bool(what, values, "allocation-depth", default=False),
    )
    return AliasConfig(values["of"], spec)


def _bool(what: str, values: Mapping[str, str], key: str, *, default: bool) -> bool:
    if key not in values:
        return default
    if values[key] not in _BOOLEANS:
        raise DaemonError(what, f"'{key}' is on or off, not '{values[key]}'")
    return _BOOLEANS[values[key]]


def _count(what: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not int(text):
        raise DaemonError(what, f"'max-connections' is a number from 1, not '{text}'")
    return int(text)


def _name_of(image: str) -> str:
    path = local_path(image)
    if path is not None:
        return PurePath(path).stem
    try:
        tree = parse_filename(image, {})
    except ImageError as error:
        raise DaemonError(error.name, error.reason) from error
    if is_json(image):
        raise DaemonError(image, "has no name of its own: give it a --name")
    return str(tree.get("export", ""))
