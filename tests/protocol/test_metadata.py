# SPDX-License-Identifier: Apache-2.0
"""Meta contexts, and the status of blocks.

Sections "Metadata querying", "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT",
"NBD_REPLY_TYPE_BLOCK_STATUS", "NBD_CMD_BLOCK_STATUS", and what extended headers change in them.
"""

from __future__ import annotations

import itertools
import struct

import pytest

from tests.protocol.client import (
    EXTENDED,
    SIMPLE,
    STRUCTURED,
    Answer,
    Client,
    info_data,
    name_and_list,
)
from tests.protocol.conftest import SPARSE_BYTES, SPARSE_STEP, Connect
from tests.protocol.wire import (
    DONE,
    STATE_HOLE,
    STATE_ZERO,
    Chunk,
    Cmd,
    CmdFlag,
    Err,
    Flag,
    Opt,
    Rep,
)

LIST, SET = Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT
ALLOCATION = "base:allocation"


@pytest.fixture
def ready(client: Client) -> Client:
    """In negotiation, structured replies agreed on."""
    client.negotiate(STRUCTURED)
    return client


@pytest.fixture(params=[STRUCTURED, EXTENDED])
def sparse(request: pytest.FixtureRequest, connect: Connect) -> Client:
    """A connection to "sparse" that has chosen base:allocation."""
    client = connect()
    client.negotiate(request.param)
    assert list(client.set_contexts("sparse", ALLOCATION).values()) == [ALLOCATION]
    client.go("sparse")
    return client


def names(client: Client, option: int, export: str, *queries: str) -> list[str]:
    """The contexts that LIST or SET answers with; it must work."""
    *contexts, final = client.ask(option, name_and_list(export, *queries))
    assert final.kind == Rep.ACK, final
    assert all(one.kind == Rep.META_CONTEXT for one in contexts)
    return [one.data[4:].decode() for one in contexts]


# --- NBD_OPT_LIST_META_CONTEXT ---


def test_list_of_no_queries_is_all_that_set_takes(ready: Client) -> None:
    listed = names(ready, LIST, "disk")
    assert ALLOCATION in listed
    assert names(ready, SET, "disk", *listed) == listed


@pytest.mark.parametrize("query", ["base:", ALLOCATION])
def test_list_of_a_query_is_what_matches_it(ready: Client, query: str) -> None:
    assert names(ready, LIST, "disk", query) == [ALLOCATION]
    assert names(ready, LIST, "disk", query, "x-unknown:y", query) == [ALLOCATION]


def test_list_ignores_unknown_namespaces_and_leaves(ready: Client) -> None:
    for query in ("x-nobody:thing", "x-nobody:", "other:base:allocation", "base:nothing"):
        assert names(ready, LIST, "disk", query) == []


def test_listed_names_have_a_namespace_and_no_id(ready: Client) -> None:
    for reply in ready.ask(LIST, name_and_list("disk"))[:-1]:
        assert reply.data[:4] == bytes(4)
        namespace, colon, leaf = reply.data[4:].decode().partition(":")
        assert namespace
        assert colon
        assert leaf


# --- NBD_OPT_SET_META_CONTEXT ---


def test_set_answers_with_the_chosen_contexts_and_unique_ids(ready: Client) -> None:
    assert ready.set_contexts("disk", ALLOCATION, ALLOCATION, "x-nobody:a")
    assert list(ready.contexts.values()) == [ALLOCATION]


def test_set_of_no_queries_chooses_nothing(ready: Client) -> None:
    assert names(ready, SET, "disk") == []
    ready.go("disk")
    assert ready.call(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL


@pytest.mark.parametrize("query", ["base:", "base:nothing", "x-nobody:a", "qemu:"])
def test_set_ignores_wild_cards_and_what_it_doesnt_know(ready: Client, query: str) -> None:
    assert names(ready, SET, "disk", query) == []


def test_set_without_structured_replies_is_invalid(client: Client) -> None:
    assert client.outcome(SET, name_and_list("disk", ALLOCATION)) == Rep.ERR_INVALID
    client.go("disk")
    assert client.alive()


def test_set_again_replaces_what_was_chosen_even_if_it_fails(connect: Connect) -> None:
    for data in (name_and_list("disk"), name_and_list("nobody", ALLOCATION), b"\0\0\0\4disk"):
        client = connect()
        client.negotiate(STRUCTURED)
        client.set_contexts("disk", ALLOCATION)
        client.ask(SET, data)
        client.go("disk")
        assert client.call(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL


def test_set_for_another_export_than_that_of_go_is_as_none(ready: Client) -> None:
    ready.set_contexts("disk", ALLOCATION)
    ready.go("sparse")
    assert ready.call(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL
    assert ready.alive()


@pytest.mark.parametrize("option", [LIST, SET])
def test_queries_with_lengths_that_lie_are_invalid(ready: Client, option: int) -> None:
    whole = name_and_list("disk", ALLOCATION)
    for data in (
        b"",
        whole[:3],
        whole[:-1],
        whole + b"x",
        struct.pack(">I4sI", 5, b"disk", 0),
        struct.pack(">I4sII4s", 4, b"disk", 1, 100, b"base"),
        struct.pack(">I4sI", 4, b"disk", 1),
    ):
        assert ready.outcome(option, data) == Rep.ERR_INVALID
    ready.go("disk")
    assert ready.alive()


@pytest.mark.parametrize("option", [LIST, SET])
def test_too_many_queries_are_too_big(ready: Client, option: int) -> None:
    outcome = ready.outcome(option, name_and_list("disk", *["base:x"] * 1500))
    assert outcome in (Rep.ERR_TOO_BIG, Rep.ACK)
    assert names(ready, option, "disk", ALLOCATION) == [ALLOCATION]


@pytest.mark.parametrize("option", [LIST, SET])
def test_contexts_of_an_unknown_export_are_an_error(ready: Client, option: int) -> None:
    assert ready.outcome(option, name_and_list("nobody", ALLOCATION)) == Rep.ERR_UNKNOWN


def test_base_contexts_never_need_extended_headers(ready: Client) -> None:
    for option in (LIST, SET):
        assert ready.outcome(option, name_and_list("disk", "base:", ALLOCATION)) == Rep.ACK


# --- NBD_CMD_BLOCK_STATUS ---


def status(client: Client, answer: Answer, offset: int) -> list[tuple[int, int, int]]:
    """The extents of an answer that must be good: offset, length, flags. Checks its form."""
    assert not answer.error, answer
    assert answer.chunks[-1].flags == DONE
    chunks = [chunk for chunk in answer.chunks if chunk.kind != Chunk.NONE]
    kind = Chunk.BLOCK_STATUS_EXT if client.style == EXTENDED else Chunk.BLOCK_STATUS
    assert [chunk.kind for chunk in chunks] == [kind] * len(client.contexts)
    context, extents = chunks[0].extents()
    assert context in client.contexts
    assert 0 < len(extents) <= 1 << 20
    found = []
    for length, flags in extents:
        assert length > 0
        found.append((offset, length, flags))
        offset += length
    return found


def true_flags(offset: int) -> int:
    """What "sparse" should say of a byte."""
    return 0 if offset // SPARSE_STEP % 2 == 0 else STATE_HOLE | STATE_ZERO


def test_status_tells_holes_and_zeroes_in_order(sparse: Client) -> None:
    for offset, length in ((0, SPARSE_BYTES), (SPARSE_STEP, 4096), (SPARSE_STEP - 512, 1024)):
        extents = status(sparse, sparse.call(Cmd.BLOCK_STATUS, offset, length), offset)
        for start, extent, flags in extents:
            assert flags & ~(STATE_HOLE | STATE_ZERO) == 0
            if flags & STATE_ZERO:
                assert {true_flags(at) for at in (start, start + extent - 1)} != {0}
                assert sparse.read(start, min(extent, 4096)) == bytes(min(extent, 4096))
        assert sum(extent for _, extent, _ in extents[:-1]) < length


def test_status_tells_what_is_easily_told(sparse: Client) -> None:
    extents = status(sparse, sparse.call(Cmd.BLOCK_STATUS, 0, SPARSE_BYTES), 0)
    assert extents == [
        (at, SPARSE_STEP, true_flags(at)) for at in range(0, SPARSE_BYTES, SPARSE_STEP)
    ]


def test_status_of_neighbours_differs_and_is_cut_at_multiples_of_512(sparse: Client) -> None:
    extents = status(sparse, sparse.call(Cmd.BLOCK_STATUS, 0, SPARSE_BYTES), 0)
    for one, next_one in itertools.pairwise(extents):
        assert one[2] != next_one[2]
    assert all(start % 512 == length % 512 == 0 for start, length, _ in extents)


def test_status_with_req_one_is_one_extent_in_the_range(sparse: Client) -> None:
    for offset, length in ((0, SPARSE_BYTES), (100, 7), (SPARSE_STEP - 1, 2), (0, 1)):
        answer = sparse.call(Cmd.BLOCK_STATUS, offset, length, flags=CmdFlag.REQ_ONE)
        [(start, extent, _)] = status(sparse, answer, offset)
        assert (start, extent <= length) == (offset, True)


def test_status_always_makes_progress_to_the_end(sparse: Client) -> None:
    offset = 0
    while offset < SPARSE_BYTES:
        length = min(100_000, SPARSE_BYTES - offset)
        offset += sum(
            extent
            for _, extent, _ in status(
                sparse, sparse.call(Cmd.BLOCK_STATUS, offset, length), offset
            )
        )


def test_status_past_the_end_is_invalid(sparse: Client) -> None:
    for offset, length in ((SPARSE_BYTES, 512), (SPARSE_BYTES - 512, 1024), (1 << 63, 1)):
        answer = sparse.call(Cmd.BLOCK_STATUS, offset, length)
        assert answer.error == Err.EINVAL
        assert answer.chunks
    assert sparse.alive()


def test_status_of_no_length_doesnt_disconnect(sparse: Client) -> None:
    sparse.call(Cmd.BLOCK_STATUS, 0, 0)
    assert sparse.alive()


def test_status_says_that_what_isnt_a_hole_can_be_written(sparse: Client) -> None:
    """No ENOSPC there, for there is room; see e2e/test_host_errors.py for disks that are full."""
    extents = status(sparse, sparse.call(Cmd.BLOCK_STATUS, 0, SPARSE_BYTES), 0)
    for start, _, flags in extents:
        if not flags & STATE_HOLE:
            assert not sparse.call(Cmd.WRITE, start, payload=b"\1" * 512).error


@pytest.mark.parametrize("style", [SIMPLE, STRUCTURED])
def test_status_payload_isnt_offered_without_extended_headers(connect: Connect, style: str) -> None:
    client = connect()
    client.negotiate(style)
    client.go("disk")
    assert not client.flags & Flag.BLOCK_STATUS_PAYLOAD


# --- with extended headers ---


@pytest.fixture
def extended(connect: Connect) -> Client:
    """A connection to "sparse" with extended headers and a context."""
    client = connect()
    client.negotiate(EXTENDED)
    client.set_contexts("sparse", ALLOCATION)
    client.go("sparse")
    return client


def ask_for(client: Client, length: int, *contexts: int, spare: bytes = b"") -> Answer:
    """BLOCK_STATUS with a payload."""
    payload = struct.pack(f">Q{len(contexts)}I", length, *contexts) + spare
    return client.call(Cmd.BLOCK_STATUS, 0, flags=CmdFlag.PAYLOAD_LEN, payload=payload)


def test_status_payload_chooses_among_the_contexts(extended: Client) -> None:
    if not extended.flags & Flag.BLOCK_STATUS_PAYLOAD:
        assert ask_for(extended, 4096, *extended.contexts).error == Err.EINVAL
        return
    assert status(extended, ask_for(extended, SPARSE_BYTES, *extended.contexts), 0)
    [context] = extended.contexts
    for answer in (
        ask_for(extended, 4096, context + 1),
        ask_for(extended, 4096, context, context),
        ask_for(extended, 4096, context, spare=b"xy"),
        ask_for(extended, SPARSE_BYTES + 1, context),
    ):
        assert answer.error == Err.EINVAL
    assert extended.alive()


def test_status_of_64_bits_has_nothing_in_the_upper_half(extended: Client) -> None:
    answer = extended.call(Cmd.BLOCK_STATUS, 0, SPARSE_BYTES)
    assert all(flags >> 32 == 0 for _, _, flags in status(extended, answer, 0))
    for chunk in answer.chunks:
        if chunk.kind == Chunk.BLOCK_STATUS_EXT:
            assert (len(chunk.payload) - 8) % 16 == 0


def test_contexts_are_good_for_info_and_go_alike(ready: Client) -> None:
    ready.set_contexts("sparse", ALLOCATION)
    assert ready.ask(Opt.INFO, info_data("sparse"))[-1].kind == Rep.ACK
    ready.go("sparse")
    assert not ready.call(Cmd.BLOCK_STATUS, 0, 4096).error
