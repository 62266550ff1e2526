# SPDX-License-Identifier: Apache-2.0
"""From a URI to what its server says: one export, or all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.address import (
    NbdAddress,
    is_nbd_uri,
    parse_uri,
    take_address,
    tls_query,
)
from blockemu.drivers.nbd.client_handshake import RefusedError
from blockemu.drivers.nbd.client_tls import with_tls
from blockemu.drivers.nbd.inspection import (
    ExportInfo,
    Inspection,
    ListedExport,
    ServerFacts,
    inspecting,
)
from blockemu.drivers.registry import Opener
from blockemu.img.session import run_session

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """A server and exports of it, each with the URI that leads to it.

    `problems`: a line for each export that is listed and can't be asked for.
    """

    server: ServerFacts
    exports: tuple[tuple[ExportInfo, str], ...]
    problems: tuple[str, ...] = ()


async def address_of(uri: str, opener: Opener, tls: Mapping[str, str] | None = None) -> NbdAddress:
    """Where `uri` leads. Suspends: while credentials are read. Raises: ImageError."""
    if not is_nbd_uri(uri):
        reason = "is no NBD URI; those begin with nbd://, nbds:// or nbd+unix://"
        raise ImageError(uri, reason)
    options = {**parse_uri(uri), **(tls or {})}
    del options["driver"]
    return await with_tls(uri, take_address(uri, options), options, opener)


def uri_of(address: NbdAddress) -> str:
    """`address` as nbdinfo writes it, with every part that has a default."""
    export = quote(address.export.encode(errors="surrogateescape"), safe="/")
    scheme = "nbd" if address.tls is None else "nbds"
    if address.path is not None:
        path = quote(address.path.encode(errors="surrogateescape"), safe="/")
        return f"{scheme}+unix:///{export}?socket={path}{tls_query(address.tls, '&')}"
    return f"{scheme}://{address.server}/{export}{tls_query(address.tls, '?')}"


def ask(uri: str, question: Callable[[Inspection, str], Coroutine[Any, Any, T]]) -> T:
    """Connect to the server of `uri`, and return the answer to `question`, which is handed the
    connection and the name of the export.

    Context: the main thread, in which no loop runs. Raises: ImageError.
    """

    async def work(opener: Opener) -> T:
        address = await address_of(uri, opener)
        async with inspecting(address, opener.ctx, shown=uri) as inspection:
            return await question(inspection, address.export)

    return run_session(work)


def ask_export(uri: str) -> ServerInfo:
    """The export of `uri`. Context: as `ask`. Raises: ImageError."""

    async def work(opener: Opener) -> ServerInfo:
        address = await address_of(uri, opener)
        async with inspecting(address, opener.ctx, shown=uri) as inspection:
            info = await inspection.info(address.export)
            return ServerInfo(server=inspection.server, exports=((info, uri_of(address)),))

    return run_session(work)


def ask_all(uri: str, tls: Mapping[str, str] | None = None) -> ServerInfo:
    """All exports of the server of `uri`. `tls`: more options of the driver's, about TLS.

    Context: as `ask`. Raises: ImageError.
    """
    return run_session(lambda opener: _ask_all(opener, uri, tls or {}))


async def _ask_all(opener: Opener, shown: str, tls: Mapping[str, str]) -> ServerInfo:
    address, ctx = await address_of(shown, opener, tls), opener.ctx
    exports: list[tuple[ExportInfo, str]] = []
    problems: list[str] = []
    async with inspecting(address, ctx, shown=shown) as inspection:
        server = inspection.server
        left = deque(await inspection.exports())
        while left and not inspection.over:
            await _ask_one(inspection, address, left.popleft(), exports, problems)
    for listed in left:  # each on a connection of its own: the server has no INFO
        async with inspecting(address, ctx, shown=shown) as inspection:
            await _ask_one(inspection, address, listed, exports, problems)
    return ServerInfo(server=server, exports=tuple(exports), problems=tuple(problems))


async def _ask_one(
    inspection: Inspection,
    address: NbdAddress,
    listed: ListedExport,
    exports: list[tuple[ExportInfo, str]],
    problems: list[str],
) -> None:
    try:
        info = await inspection.info(listed.name)
    except RefusedError as error:
        problems.append(f"export '{listed.name}': {error}")
        return
    if not info.description and listed.description:
        info = replace(info, description=listed.description)
    exports.append((info, uri_of(replace(address, export=listed.name))))
