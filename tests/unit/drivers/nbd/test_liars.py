# SPDX-License-Identifier: Apache-2.0
"""Servers that lie: whatever they say, opening and requests end with one clear line, soon, and
memory stays where it was."""

from __future__ import annotations

import random
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd import replies
from blockemu.drivers.nbd.protocol import (
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_REP_MAGIC,
    NBDMAGIC,
    OPTION_REPLY,
    Option,
    Reply,
)
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import DriverTable, Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import PosixFiles
from blockemu.loop.sync import gather
from tests.peers.process import nbd_uri
from tests.peers.scripted_nbd import SIZE, Client, ScriptedNbd

GO, ACK = Option.NBD_OPT_GO, Reply.NBD_REP_ACK
EXPORT = INFO_EXPORT.pack(0, SIZE, 0x65)


def open_and_close(ctx: AioContext, opener: Opener, path: Path, **options: Any) -> None:
    node = ctx.run(opener.open({"driver": "nbd", "path": str(path), **options}))
    ctx.run(node.close())


def greeting(*fields: int) -> Callable[[Client], None]:
    return lambda client: client.send(GREETING.pack(*fields))


def to_option(asked: int, *replies: tuple[int, bytes]) -> Callable[[Client], None]:
    """Good up to one option, to which these are the replies; the others aren't known."""

    def serve(client: Client) -> None:
        client.greet()
        while True:
            option, _ = client.option()
            if option == asked:
                for kind, data in replies:
                    client.reply(option, kind, data)
            elif option == Option.NBD_OPT_STRUCTURED_REPLY:
                client.reply(option, ACK)
            elif option == GO and asked != GO:
                client.reply(option, Reply.NBD_REP_INFO, EXPORT)
                client.reply(option, ACK)
            else:
                client.reply(option, Reply.NBD_REP_ERR_UNSUP)

    return serve


def to_go(*infos: bytes) -> Callable[[Client], None]:
    replies = [(int(Reply.NBD_REP_INFO), info) for info in infos]
    return to_option(GO, *replies, (ACK, b""))


def reply_head(magic: int, option: int, length: int) -> Callable[[Client], None]:
    def serve(client: Client) -> None:
        client.greet()
        client.option()
        client.send(OPTION_REPLY.pack(magic, option, ACK, length))

    return serve


def without_go_but_extended(client: Client) -> None:
    client.greet()
    while True:
        option, _ = client.option()
        known = option == Option.NBD_OPT_EXTENDED_HEADERS
        client.reply(option, ACK if known else Reply.NBD_REP_ERR_UNSUP)


def blocks(*sizes: int) -> Callable[[Client], None]:
    return to_go(EXPORT, INFO_BLOCK_SIZE.pack(3, *sizes))


EXTENDED, CONTEXT = Option.NBD_OPT_EXTENDED_HEADERS, Option.NBD_OPT_SET_META_CONTEXT
META = Reply.NBD_REP_META_CONTEXT
NAME = struct.pack(">I", 1) + b"base:allocation"

LIES: dict[str, tuple[str, Callable[[Client], None]]] = {
    "silent": ("the server hung up", lambda client: None),
    "http": ("is no NBD server", lambda client: client.send(b"HTTP/1.1 400 Bad Request")),
    "oldstyle": ("the old style", greeting(NBDMAGIC, 0x00420281861253, 0)),
    "magic": ("a bad magic number, 0x7", greeting(NBDMAGIC, 7, 3)),
    "reply-magic": ("reply has a bad magic number, 0x9", reply_head(9, EXTENDED, 0)),
    "other-option": ("answers option 99, and was asked 11", reply_head(NBD_REP_MAGIC, 99, 0)),
    "long-reply": ("has 4294967295 bytes", reply_head(NBD_REP_MAGIC, EXTENDED, 0xFFFFFFFF)),
    "extended-data": ("EXTENDED_HEADERS with reply type 0x1", to_option(EXTENDED, (ACK, b"x"))),
    "extended-type": ("EXTENDED_HEADERS with reply type 0x3", to_option(EXTENDED, (3, b""))),
    "extended-old": ("and doesn't know GO", without_go_but_extended),
    "context-other": (
        "meta context 'base:evil', which",
        to_option(CONTEXT, (META, struct.pack(">I", 1) + b"base:evil")),
    ),
    "context-twice": ("what wasn't asked", to_option(CONTEXT, (META, NAME), (META, NAME))),
    "context-short": ("what wasn't asked", to_option(CONTEXT, (META, b"abc"))),
    "go-nothing": ("doesn't say how long", to_go()),
    "go-endless": ("without end", to_option(GO, *[(int(Reply.NBD_REP_INFO), EXPORT)] * 1025)),
    "go-type": ("GO with reply type 0x2", to_option(GO, (Reply.NBD_REP_SERVER, b""))),
    "go-short": ("information has 11 bytes, not 12", to_go(EXPORT[:-1])),
    "huge": ("has 9223372036854775808 bytes", to_go(INFO_EXPORT.pack(0, 1 << 63, 1))),
    "block-0": ("minimum block size is 0", blocks(0, 4096, 1 << 25)),
    "block-odd": ("minimum block size is 768", blocks(768, 4096, 1 << 25)),
    "block-big": ("minimum block size is 131072", blocks(1 << 17, 1 << 17, 1 << 25)),
    "preferred": ("preferred block size is 0", blocks(512, 0, 1 << 25)),
    "preferred-odd": ("preferred block size is 5000", blocks(512, 5000, 1 << 25)),
    "maximum": ("at least 4096, at most 512", blocks(4096, 4096, 512)),
    "maximum-0": ("at least 512, at most 0", blocks(512, 4096, 0)),
    "ragged": (
        "has 1000 bytes, in blocks of 512",
        to_go(INFO_EXPORT.pack(0, 1000, 1), INFO_BLOCK_SIZE.pack(3, 512, 4096, 1 << 25)),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_negotiation_is_one_line(
    ctx: AioContext, opener: Opener, tmp_path: Path, lie: str
) -> None:
    said, serve = LIES[lie]
    with ScriptedNbd(tmp_path / "s", serve), pytest.raises(ImageError, match=said) as caught:
        open_and_close(ctx, opener, tmp_path / "s")
    assert str(caught.value).startswith(f"{nbd_uri(tmp_path / 's')}: ".replace(":///?", "://?"))
    assert "\n" not in str(caught.value)


def test_a_bitmap_that_is_not_there_is_one_line(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    for structured in (False, True):
        path = tmp_path / f"s{structured}"
        serve = to_option(CONTEXT, (ACK, b"")) if structured else Client.negotiate
        with (
            ScriptedNbd(path, serve),
            pytest.raises(ImageError, match="no meta context 'qemu:dirty-bitmap:b'"),
        ):
            open_and_close(ctx, opener, path, **{"x-dirty-bitmap": "qemu:dirty-bitmap:b"})


HANG_UP_S = 0.05


class Mutated:
    """A good server whose every word may be another. When it hears nothing, since the client waits
    for more, or has been served often enough, it hangs up."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.extended = self.rng.random() < 0.5
        self.structured = self.rng.random() < 0.7
        self.negotiation = self.rng.random() < 0.3

    def send(self, client: Client, data: bytes, *, chance: float = 0.3) -> None:
        rng = self.rng
        if rng.random() < chance:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 3)):
                how = rng.randrange(4)
                at = rng.randrange(len(changed) + 1)
                if how == 0:
                    changed[at : at + 1] = bytes([rng.randrange(256)])
                elif how == 1:
                    del changed[at : at + rng.randrange(1, 9)]
                elif how == 2:
                    changed[at:at] = rng.randbytes(rng.randrange(1, 9))
                else:
                    changed += bytes(changed)
            data = bytes(changed)
        client.send(data)

    def serve(self, client: Client) -> None:
        client.sock.settimeout(HANG_UP_S)
        if self.negotiation:
            send = client.send
            client.send = lambda data: self.send(client_plain, data, chance=0.1)  # type: ignore[method-assign]
            client_plain = Client(client.sock)
            client.negotiate(structured=self.structured, extended=self.extended)
            client.send = send  # type: ignore[method-assign]
        else:
            client.negotiate(structured=self.structured, extended=self.extended)
        for _ in range(self.rng.randrange(1, 12)):
            self.answer(client)

    def answer(self, client: Client) -> None:
        if self.extended:
            head = struct.unpack(">IHHQQQ", client.receive(32))
        else:
            head = struct.unpack(">IHHQQI", client.receive(28))
        _, _, command, cookie, offset, length = head
        if command == 1:
            client.receive(length)
        chunks: list[tuple[int, bytes]] = [(0, b"")]
        if command == 0:
            half = length // 2
            chunks = [
                (1, struct.pack(">Q", offset) + b"d" * half),
                (2, struct.pack(">QI", offset + half, length - half)),
            ]
        elif command == 7:
            extent = struct.pack(">IIQQ", 1, 1, length, 0)
            chunks = [(6, extent) if self.extended else (5, struct.pack(">III", 1, length, 0))]
        if not self.structured and not self.extended:
            data = b"d" * length if command == 0 else b""
            self.send(client, struct.pack(">IIQ", 0x67446698, 0, cookie) + data)
            return
        for index, (kind, payload) in enumerate(chunks):
            done = index == len(chunks) - 1 and self.rng.random() < 0.95
            if self.extended:
                head = (0x6E8A278C, done, kind, cookie, offset, len(payload))
                self.send(client, struct.pack(">IHHQQQ", *head) + payload)
            else:
                head = (0x668E33EF, done, kind, cookie, len(payload))
                self.send(client, struct.pack(">IHHQI", *head) + payload)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_mutated_servers_are_an_error_or_right(seed: int) -> None:
    """Nothing but OSError and ImageError comes out, and nothing hangs: a read that says nothing is
    of the right length, and a status makes progress."""
    ctx = AioContext("test")
    ctx.adopt()
    listener = bound()
    port = listener.getsockname()[1]
    opener = Opener(files=PosixFiles(), ctx=ctx, drivers=DriverTable())
    try:
        with ScriptedNbd(listener, Mutated(seed).serve):
            options = {"driver": "nbd", "host": "127.0.0.1", "port": port}
            try:
                node = ctx.run(opener.open(options))
            except ImageError:
                return
            try:
                ctx.run(use(node, random.Random(seed)))
            finally:
                ctx.run(node.close())
    finally:
        ctx.close()


def bound() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


async def use(node: BlockDriverState, rng: random.Random) -> None:
    """Some of everything, several at a time. Errors are fine."""

    async def one(number: int) -> None:
        length = 512 * rng.randrange(1, 200)
        offset = 512 * rng.randrange(0, SIZE // 512 - 200)
        view = memoryview(bytearray(length))
        try:
            if number == 0:
                await node.preadv(offset, view)
            elif number == 1:
                await node.pwritev(offset, view)
            elif number == 2:
                status = await node.block_status(offset, length)
                assert 0 < status.length <= length
            elif number == 3:
                await node.pwrite_zeroes(offset, length)
            else:
                await node.flush()
        except OSError:
            pass

    for _ in range(3):
        await gather(*(one(rng.randrange(5)) for _ in range(6)))


def test_endless_replies_cost_no_memory(
    ctx: AioContext, opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end with as many chunks as a reply may have, and what came before isn't kept."""
    monkeypatch.setattr(replies, "CHUNKS_MAX", 4096)

    def serve(client: Client) -> None:
        client.negotiate(structured=True)
        _, _, cookie, _, _ = client.request()
        message = struct.pack(">IH", 5, 1000) + b"e" * 1000
        chunk = struct.pack(">IHH8sI", 0x668E33EF, 0, 0x8001, cookie, len(message)) + message
        while True:
            client.send(chunk * 64)

    with ScriptedNbd(tmp_path / "s", serve):
        node = ctx.run(opener.open({"driver": "nbd", "path": str(tmp_path / "s")}))
        tracemalloc.start()
        try:
            with pytest.raises(OSError, match="more than 4096 chunks"):
                ctx.run(node.preadv(0, memoryview(bytearray(512))))
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        ctx.run(node.close())
    assert peak_bytes < 1 << 20
