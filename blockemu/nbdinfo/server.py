# SPDX-License-Identifier: Apache-2.0
"""From a URI to what its server says: one export, or all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.address import NbdAddress, is_nbd_uri, parse_uri, take_address
from blockemu.drivers.nbd.client_handshake import RefusedError
from blockemu.drivers.nbd.inspection import (
    ExportInfo,
    Inspection,
    ListedExport,
    ServerFacts,
    inspecting,
)
from blockemu.img.session import run_session
from blockemu.loop.aio_context import AioContext

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """A server and exports of it, each with the URI that leads to it.

    `problems`: a line for each export that is listed and can't be asked for.
    """

    server: ServerFacts
    exports: tuple[tuple[ExportInfo, str], ...]
    problems: tuple[str, ...] = ()


def address_of(uri: str) -> NbdAddress:
    """Where `uri` leads. Raises: ImageError."""
    if not is_nbd_uri(uri):
        reason = "is no NBD URI; those begin with nbd://, nbds:// or nbd+unix://"
        raise ImageError(uri, reason)
    options = parse_uri(uri)
    del options["driver"]
    return take_address(uri, options)


def uri_of(address: NbdAddress) -> str:
    """`address` as nbdinfo writes it, with every part that has a default."""
    export = quote(address.export.encode(errors="surrogateescape"), safe="/")
    if address.path is not None:
        path = quote(address.path.encode(errors="surrogateescape"), safe="/")
        return f"nbd+unix:///{export}?socket={path}"
    return f"nbd://{address.server}/{export}"


def ask(uri: str, question: Callable[[Inspection, str], Coroutine[Any, Any, T]]) -> T:
    """Connect to the server of `uri`, and return the answer to `question`, which is handed the
    connection and the name of the export.

    Context: the main thread, in which no loop runs. Raises: ImageError.
    """
    address = address_of(uri)

    async def work(ctx: AioContext) -> T:
        async with inspecting(address, ctx, shown=uri) as inspection:
            return await question(inspection, address.export)

    return run_session(lambda opener: work(opener.ctx))


def ask_export(uri: str) -> ServerInfo:
    """The export of `uri`. Context: as `ask`. Raises: ImageError."""

    async def question(inspection: Inspection, export: str) -> ServerInfo:
        info = await inspection.info(export)
        shown = uri_of(address_of(uri))
        return ServerInfo(server=inspection.server, exports=((info, shown),))

    return ask(uri, question)


def ask_all(uri: str) -> ServerInfo:
    """All exports of the server of `uri`. Context: as `ask`. Raises: ImageError."""
    address = address_of(uri)
    return run_session(lambda opener: _ask_all(address, opener.ctx, uri))


async def _ask_all(address: NbdAddress, ctx: AioContext, shown: str) -> ServerInfo:
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
