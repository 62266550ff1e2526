# SPDX-License-Identifier: Apache-2.0
"""The exports of a server as `qemu-nbd --list` shows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from blockemu.drivers.nbd.address import NbdAddress
from blockemu.drivers.nbd.inspection import ExportInfo
from blockemu.drivers.nbd.protocol import TransmissionFlag
from blockemu.nbdinfo.server import ask_all, uri_of

_FLAG = TransmissionFlag

_WORDS: Final = {
    _FLAG.NBD_FLAG_READ_ONLY: "readonly",
    _FLAG.NBD_FLAG_SEND_FLUSH: "flush",
    _FLAG.NBD_FLAG_SEND_FUA: "fua",
    _FLAG.NBD_FLAG_ROTATIONAL: "rotational",
    _FLAG.NBD_FLAG_SEND_TRIM: "trim",
    _FLAG.NBD_FLAG_SEND_WRITE_ZEROES: "zeroes",
    _FLAG.NBD_FLAG_SEND_DF: "df",
    _FLAG.NBD_FLAG_CAN_MULTI_CONN: "multi",
    _FLAG.NBD_FLAG_SEND_RESIZE: "resize",
    _FLAG.NBD_FLAG_SEND_CACHE: "cache",
    _FLAG.NBD_FLAG_SEND_FAST_ZERO: "fast-zero",
}


def list_exports(
    address: NbdAddress, *, tls_id: str | None = None, tls_hostname: str | None = None
) -> Iterator[str]:
    """Line by line. `tls_id`: of an object with credentials.

    Context: the main thread, in which no loop runs. Raises: ImageError.
    """
    tls = {"tls-creds": tls_id, "tls-hostname": tls_hostname}
    found = ask_all(uri_of(address), {key: value for key, value in tls.items() if value})
    yield f"exports available: {len(found.exports)}"
    for export, _ in found.exports:
        yield from _lines(export)


def _lines(export: ExportInfo) -> Iterator[str]:
    yield f" export: '{export.name}'"
    if export.description:
        yield f"  description: {export.description}"
    yield f"  size:  {export.size}"
    words = [word for flag, word in _WORDS.items() if export.flags & flag]
    yield f"  flags: {int(export.flags):#x} ( {' '.join(words)} )"
    for what, size in zip(("min", "opt", "max"), export.blocks or (), strict=False):
        yield f"  {what} block: {size}"
    if export.contexts:
        yield f"  available meta contexts: {len(export.contexts)}"
        yield from (f"   {context}" for context in export.contexts)
