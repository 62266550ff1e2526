# SPDX-License-Identifier: Apache-2.0
"""A server and its exports for people and for programs, with nbdinfo's words and keys.

One difference: nbdinfo reads the first bytes of an export and runs `file` on them for a `content`;
we read nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.inspection import ExportInfo, ServerFacts
from blockemu.drivers.nbd.protocol import TransmissionFlag
from blockemu.nbdinfo.server import ServerInfo

_FLAG = TransmissionFlag

FLAGS: Final = {
    "is_rotational": _FLAG.NBD_FLAG_ROTATIONAL,
    "is_read_only": _FLAG.NBD_FLAG_READ_ONLY,
    "can_cache": _FLAG.NBD_FLAG_SEND_CACHE,
    "can_df": _FLAG.NBD_FLAG_SEND_DF,
    "can_fast_zero": _FLAG.NBD_FLAG_SEND_FAST_ZERO,
    "can_flush": _FLAG.NBD_FLAG_SEND_FLUSH,
    "can_fua": _FLAG.NBD_FLAG_SEND_FUA,
    "can_multi_conn": _FLAG.NBD_FLAG_CAN_MULTI_CONN,
    "can_trim": _FLAG.NBD_FLAG_SEND_TRIM,
    "can_zero": _FLAG.NBD_FLAG_SEND_WRITE_ZEROES,
}

BLOCK_SIZES: Final = ("block_size_minimum", "block_size_preferred", "block_size_maximum")

_UNITS: Final = "KMGTPE"

PROPERTIES: Final[dict[str, Callable[[ServerFacts, ExportInfo], bool]]] = {
    "connect": lambda server, export: True,
    "read": lambda server, export: True,
    "write": lambda server, export: not export.flags & _FLAG.NBD_FLAG_READ_ONLY,
    "tls": lambda server, export: server.tls,
    "structured-reply": lambda server, export: server.structured,
    "structured": lambda server, export: server.structured,
    "read-only": lambda server, export: _has(export, "is_read_only"),
    "rotational": lambda server, export: _has(export, "is_rotational"),
    "cache": lambda server, export: _has(export, "can_cache"),
    "df": lambda server, export: _has(export, "can_df"),
    "fast-zero": lambda server, export: _has(export, "can_fast_zero"),
    "flush": lambda server, export: _has(export, "can_flush"),
    "fua": lambda server, export: _has(export, "can_fua"),
    "multi-conn": lambda server, export: _has(export, "can_multi_conn"),
    "trim": lambda server, export: _has(export, "can_trim"),
    "zero": lambda server, export: _has(export, "can_zero"),
}
"""What `--can` and `--is` ask for."""


def _has(export: ExportInfo, name: str) -> bool:
    return bool(export.flags & FLAGS[name])


def has_property(found: ServerInfo, name: str) -> bool:
    """Whether the one export has it. Raises: ImageError, where nobody knows it."""
    ((export, _),) = found.exports
    return property_named(name)(found.server, export)


def property_named(name: str) -> Callable[[ServerFacts, ExportInfo], bool]:
    """What decides about it. Raises: ImageError."""
    if name not in PROPERTIES:
        raise ImageError(name, f"is nothing that can be asked for; known: {', '.join(PROPERTIES)}")
    return PROPERTIES[name]


def short_size(size_bytes: int) -> str:
    """`size_bytes` in the largest unit that divides it: 64M, 1536K, 1000."""
    power = 0
    while size_bytes and not size_bytes % 1024 and power < len(_UNITS):
        size_bytes //= 1024
        power += 1
    return f"{size_bytes}{_UNITS[power - 1] if power else ''}"


def format_json(found: ServerInfo) -> str:
    """As `nbdinfo --json`."""
    facts: dict[str, Any] = {
        "protocol": found.server.protocol,
        "TLS": found.server.tls,
        "structured": found.server.structured,
        "exports": [_fields(export, uri) for export, uri in found.exports],
    }
    return json.dumps(facts, indent=2)


def _fields(export: ExportInfo, uri: str) -> dict[str, Any]:
    name = export.name if export.canonical is None else export.canonical
    fields: dict[str, Any] = {"export-name": name}
    if export.description:
        fields["description"] = export.description
    fields["uri"] = uri
    if export.contexts:
        fields["contexts"] = list(export.contexts)
    fields |= {key: _has(export, key) for key in FLAGS}
    if export.blocks is not None:
        fields |= zip(BLOCK_SIZES, export.blocks, strict=True)
    fields["export-size"] = export.size
    fields["export-size-str"] = short_size(export.size)
    return fields


def format_human(found: ServerInfo) -> list[str]:
    """As nbdinfo without options; a line each."""
    server = found.server
    tls = "with TLS" if server.tls else "without TLS"
    packets = "structured" if server.structured else "simple"
    lines = [f"protocol: {server.protocol} {tls}, using {packets} packets"]
    for export, uri in found.exports:
        lines += _lines(export, uri)
    return lines


def _lines(export: ExportInfo, uri: str) -> list[str]:
    fields = _fields(export, uri)
    size, short = fields.pop("export-size"), fields.pop("export-size-str")
    lines = [f'export="{fields.pop("export-name")}":']
    if "description" in fields:
        lines.append(f"    description: {fields.pop('description')}")
    lines.append(f"    export-size: {size}" + (f" ({short})" if short != str(size) else ""))
    for key, value in fields.items():
        if isinstance(value, list):
            lines += [f"    {key}:", *(f"        {item}" for item in value)]
        else:
            lines.append(f"    {key}: {str(value).lower() if isinstance(value, bool) else value}")
    return lines
