# SPDX-License-Identifier: Apache-2.0
"""Asking servers that are old, lie or hang up: what they are is said in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd import inspection as subject
from blockemu.drivers.nbd.address import NbdAddress
from blockemu.drivers.nbd.inspection import ExportInfo, Inspection, ListedExport, inspecting
from blockemu.drivers.nbd.protocol import INFO_EXPORT, ChunkType, Option, Reply
from blockemu.loop.aio_context import AioContext
from tests.peers.scripted_nbd import SIZE, Client, ScriptedNbd

CONTEXT = struct.pack(">I", 7) + b"base:allocation"
STRUCTURED = 0x668E33EF
Answer = Callable[[Client, int, bytes], bool]


def server(answer: Answer) -> Callable[[Client], None]:
    """One with structured replies; `answer` may answer an option first, and says whether it did."""

    def serve(client: Client) -> None:
        client.greet()
        while True:
            option, data = client.option()
            if answer(client, option, data):
                continue
            if option == Option.NBD_OPT_ABORT:
                client.reply(option, Reply.NBD_REP_ACK)
                return
            if option in (Option.NBD_OPT_INFO, Option.NBD_OPT_GO):
                client.reply(option, Reply.NBD_REP_INFO, INFO_EXPORT.pack(0, SIZE, 3))
            elif option in (Option.NBD_OPT_SET_META_CONTEXT, Option.NBD_OPT_LIST_META_CONTEXT):
                client.reply(option, Reply.NBD_REP_META_CONTEXT, CONTEXT)
            client.reply(option, Reply.NBD_REP_ACK)
            if option == Option.NBD_OPT_GO:
                return

    return serve


def ask_exports(ctx: AioContext, path: Path) -> list[ListedExport]:
    async def work() -> list[ListedExport]:
        async with inspecting(NbdAddress(path=str(path)), ctx, shown="URI") as inspection:
            return await inspection.exports()

    return ctx.run(work())


def ask_info(ctx: AioContext, path: Path) -> ExportInfo:
    async def work() -> ExportInfo:
        async with inspecting(NbdAddress(path=str(path)), ctx, shown="URI") as inspection:
            return await inspection.info("disk")

    return ctx.run(work())


def ask_map(ctx: AioContext, path: Path) -> list[tuple[int, int]]:
    async def work(inspection: Inspection) -> list[tuple[int, int]]:
        info, number = await inspection.choose("disk", "base:allocation")
        return [one async for more in inspection.statuses(info, number) for one in more]

    async def connected() -> list[tuple[int, int]]:
        async with inspecting(NbdAddress(path=str(path)), ctx, shown="URI") as inspection:
            return await work(inspection)

    return ctx.run(connected())


def test_a_server_without_info_gives_the_export_and_gets_it_back(
    ctx: AioContext, tmp_path: Path
) -> None:
    """GO, then a DISC; and EXPORT_NAME for one that has no GO either."""
    seen: list[int] = []

    def serve(client: Client) -> None:
        client.greet()
        while True:
            option, _ = client.option()
            seen.append(option)
            if option == Option.NBD_OPT_GO and go:
                client.reply(option, Reply.NBD_REP_INFO, INFO_EXPORT.pack(0, SIZE, 3))
                client.reply(option, Reply.NBD_REP_ACK)
                break
            if option == Option.NBD_OPT_EXPORT_NAME:
                client.send(struct.pack(">QH", SIZE, 3))
                break
            client.reply(option, Reply.NBD_REP_ERR_UNSUP)
        seen.append(-client.request()[1])

    go = True
    with ScriptedNbd(tmp_path / "s", serve):
        assert ask_info(ctx, tmp_path / "s").size == SIZE
    assert seen == [Option.NBD_OPT_STRUCTURED_REPLY, Option.NBD_OPT_INFO, Option.NBD_OPT_GO, -2]
    go = False
    with ScriptedNbd(tmp_path / "t", serve):
        assert ask_info(ctx, tmp_path / "t").flags == 3
    assert seen[-2:] == [Option.NBD_OPT_EXPORT_NAME, -2]


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        (Reply.NBD_REP_ERR_POLICY, b"not you", "listing its exports: the server's policy forbids"),
        (Reply.NBD_REP_ERR_UNSUP, b"", "listing its exports: the server answers with error"),
        (Reply.NBD_REP_SERVER, b"\0\0", "server answers LIST with reply type 0x2"),
        (Reply.NBD_REP_SERVER, b"\0\0\0\x09disk", "server lists an export whose name is cut off"),
        (Reply.NBD_REP_INFO, b"\0\0", "server answers LIST with reply type 0x3"),
    ],
)
def test_a_bad_answer_to_list_is_said(
    ctx: AioContext, tmp_path: Path, kind: Reply, data: bytes, reason: str
) -> None:
    def answer(client: Client, option: int, _: bytes) -> bool:
        if option == Option.NBD_OPT_LIST:
            client.reply(option, kind, data)
        return option == Option.NBD_OPT_LIST

    with (
        ScriptedNbd(tmp_path / "s", server(answer)),
        pytest.raises(ImageError, match=f"^URI: {reason}"),
    ):
        ask_exports(ctx, tmp_path / "s")


def test_a_list_without_end_ends(
    ctx: AioContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "EXPORTS_MAX", 3)

    def answer(client: Client, option: int, _: bytes) -> bool:
        while option == Option.NBD_OPT_LIST:
            client.reply(option, Reply.NBD_REP_SERVER, b"\0\0\0\1e")
        return False

    with (
        ScriptedNbd(tmp_path / "s", server(answer)),
        pytest.raises(ImageError, match="lists more than 3 exports"),
    ):
        ask_exports(ctx, tmp_path / "s")


def test_a_silent_server_is_left(
    ctx: AioContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "SILENCE_NS", 1_000_000)
    with (
        ScriptedNbd(tmp_path / "s", lambda client: client.receive(1) and None),
        pytest.raises(ImageError, match="the server says nothing for"),
    ):
        ask_exports(ctx, tmp_path / "s")


def status(client: Client, cookie: bytes, extents: list[tuple[int, int]], number: int = 7) -> None:
    data = struct.pack(">I", number) + b"".join(struct.pack(">II", *one) for one in extents)
    kind = ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS
    client.send(struct.pack(">IHH8sI", STRUCTURED, 1, kind, cookie, len(data)) + data)


def mapped(reply: Callable[[Client, bytes], None]) -> Callable[[Client], None]:
    """A server whose BLOCK_STATUS is answered by `reply`."""
    negotiate = server(lambda *_: False)

    def serve(client: Client) -> None:
        negotiate(client)
        while True:
            _, command, cookie, _, _ = client.request()
            if command == 2:
                return
            reply(client, cookie)

    return serve


def test_an_extent_past_the_end_is_cut_off(ctx: AioContext, tmp_path: Path) -> None:
    extents = [(SIZE - 10, 3), (20, 0), (5, 1)]
    serve = mapped(lambda client, cookie: status(client, cookie, extents))
    with ScriptedNbd(tmp_path / "s", serve):
        assert ask_map(ctx, tmp_path / "s") == [(SIZE - 10, 3), (10, 0)]


def _error(client: Client, cookie: bytes) -> None:
    text = b"no map today"
    data = struct.pack(">IH", 1, len(text)) + text
    kind = ChunkType.NBD_REPLY_TYPE_ERROR
    client.send(struct.pack(">IHH8sI", STRUCTURED, 1, kind, cookie, len(data)) + data)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda client, cookie: status(client, cookie, []), "a block status of 4 bytes"),
        (lambda client, cookie: status(client, cookie, [(0, 0)]), "a block status of no bytes"),
        (lambda client, cookie: status(client, cookie, [(9, 0)], 8), "of another context"),
        (lambda client, cookie: status(client, b"whatever", [(9, 0)]), "that it wasn't sent"),
        (_error, r"the server refuses: Operation not permitted \('no map today'\)"),
        (
            lambda client, cookie: client.send(struct.pack(">II8s", 0x67446698, 22, cookie)),
            "the server refuses: Invalid argument",
        ),
        (lambda client, _: client.send(bytes(16)), "a bad magic number"),
        (
            lambda client, cookie: client.send(
                struct.pack(">IHH8sI", STRUCTURED, 1, 5, cookie, 1 << 30)
            ),
            "sends a chunk of 1073741824 bytes",
        ),
        (
            lambda client, cookie: client.send(
                struct.pack(">IHH8sI", STRUCTURED, 0, 1, cookie, 0)
            ),
            "a chunk of type 1",
        ),
    ],
)  # fmt: skip
def test_a_bad_block_status_is_said(
    ctx: AioContext, tmp_path: Path, reply: Callable[[Client, bytes], None], reason: str
) -> None:
    with ScriptedNbd(tmp_path / "s", mapped(reply)), pytest.raises(ImageError, match=reason):
        ask_map(ctx, tmp_path / "s")
