# SPDX-License-Identifier: Apache-2.0
"""The control socket's protocol: greeting, negotiation, errors in QEMU's words, bounds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import blockemu
from blockemu.drivers.metadata_budget import MetadataBudget
from blockemu.loop.aio_context import AioContext
from blockemu.nbd.statistics import ExportStatistics
from blockemu.qmp import dispatch, monitor
from blockemu.qmp.command import Command, Session
from blockemu.qmp.commands import COMMANDS
from blockemu.qmp.json_stream import REQUEST_BYTES_MAX
from blockemu.qmp.server import MONITORS_MAX, QmpServer
from tests.unit.qmp.qmp_client import LoopClient

Connect = Callable[[], LoopClient]
NOT_FOUND = "CommandNotFound"
GENERIC = "GenericError"


def error(error_class: str, desc: str) -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": desc}}


def test_greeting_says_version_and_capabilities(connect: Connect) -> None:
    greeting = connect().receive()["QMP"]
    assert greeting["capabilities"] == []
    assert greeting["version"]["package"] == f"blockemu {blockemu.__version__}"
    assert set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}


def test_command_before_negotiation_is_refused(connect: Connect) -> None:
    client = connect()
    client.receive()
    desc = "Expecting capabilities negotiation with 'qmp_capabilities'"
    assert client.execute("query-version") == error(NOT_FOUND, desc)
    assert client.execute("qmp_capabilities") == {"return": {}}
    assert "return" in client.execute("query-version")


def test_second_negotiation_is_refused(client: LoopClient) -> None:
    desc = "Capabilities negotiation is already complete, command ignored"
    assert client.execute("qmp_capabilities") == error(NOT_FOUND, desc)


@pytest.mark.parametrize(
    ("enable", "desc"),
    [
        (["oob"], "Capability 'oob' is not offered by this server"),
        (["x"], "Parameter 'enable[0]' does not accept value 'x'"),
        ("oob", "Invalid parameter type for 'enable', expected: array"),
    ],
)
def test_bad_capability_is_refused_and_negotiation_stays_open(
    connect: Connect, enable: Any, desc: str
) -> None:
    client = connect()
    client.receive()
    assert client.execute("qmp_capabilities", {"enable": enable}) == error(GENERIC, desc)
    assert client.execute("qmp_capabilities", {"enable": []}) == {"return": {}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"execute":"nope"}', error(NOT_FOUND, "The command nope has not been found")),
        ('{"execute":1}', error(GENERIC, "QMP input member 'execute' must be a string")),
        ('{"exec":1}', error(GENERIC, "QMP input member 'exec' is unexpected")),
        ('{"id":1}', {"id": 1, **error(GENERIC, "QMP input lacks member 'execute'")}),
        ("[1]", error(GENERIC, "QMP input must be a JSON object")),
        ("3 ", error(GENERIC, "QMP input must be a JSON object")),
        (
            '{"execute":"query-version","arguments":3}',
            error(GENERIC, "QMP input member 'arguments' must be an object"),
        ),
        (
            '{"execute":"query-version","arguments":{"x":1}}',
            error(GENERIC, "Parameter 'x' is unexpected"),
        ),
    ],
)
def test_bad_request_gets_the_error_that_qemu_gives(
    client: LoopClient, text: str, expected: dict[str, Any]
) -> None:
    assert client.ask(text) == expected
    assert "return" in client.execute("query-version")


@pytest.mark.parametrize("text", ["}", "{nonsense}", '{"a":1,"a":2}', '{"execute" "x"}'])
def test_broken_json_is_an_error_and_the_connection_goes_on(client: LoopClient, text: str) -> None:
    response = client.ask(text)
    assert response["error"]["class"] == GENERIC
    assert response["error"]["desc"].startswith("JSON parse error")
    assert "return" in client.execute("query-version")


def test_endless_request_is_an_error_and_the_connection_goes_on(
    ctx: AioContext, client: LoopClient
) -> None:
    rest = memoryview(b'["' + b"x" * REQUEST_BYTES_MAX)
    while rest:
        try:
            rest = rest[client.sock.send(rest) :]
        except BlockingIOError:
            ctx.poll(blocking=False)
    assert client.receive()["error"]["desc"].startswith("JSON parse error, request over")
    assert client.ask('x"]\n{"execute":"query-version","id":1}')["id"] == 1


@pytest.mark.parametrize("ident", [1, "x", [1, 2], {"a": 1}, None, False])
def test_id_comes_back_with_result_and_error(client: LoopClient, ident: Any) -> None:
    import json

    good = client.ask(json.dumps({"execute": "query-version", "id": ident}))
    bad = client.ask(json.dumps({"execute": "nope", "id": ident}))
    assert ("return" in good, good["id"]) == (True, ident)
    assert ("error" in bad, bad["id"]) == (True, ident)


def test_pipelined_requests_are_answered_in_order(client: LoopClient) -> None:
    count = monitor.REQUESTS_QUEUED_MAX * 5
    client.send("".join(f'{{"execute":"query-version","id":{i}}}' for i in range(count)))
    assert [client.receive()["id"] for _ in range(count)] == list(range(count))


def test_two_monitors_negotiate_each_for_itself(connect: Connect) -> None:
    first, second = connect(), connect()
    first.receive()
    second.receive()
    first.execute("qmp_capabilities")
    assert "return" in first.execute("query-version")
    assert "error" in second.execute("query-version")


def test_events_reach_those_who_negotiated(
    connect: Connect, client: LoopClient, server: QmpServer
) -> None:
    stranger = connect()
    stranger.receive()
    server.broadcast({"event": "X"})
    assert client.receive() == {"event": "X"}
    assert "error" in stranger.execute("query-version")


def test_client_over_the_bound_is_turned_away_and_others_stay(connect: Connect) -> None:
    clients = [connect() for _ in range(MONITORS_MAX)]
    for each in clients:
        each.receive()
    connect().wait_for_end()
    clients[0].close()
    clients[1].execute("query-version")
    assert "QMP" in connect().receive()


def test_client_that_hangs_up_is_forgotten(
    ctx: AioContext, client: LoopClient, server: QmpServer
) -> None:
    assert len(server.monitors) == 1
    client.send('{"execute":"query-version"}')
    client.close()
    while server.monitors:
        ctx.poll(blocking=True)


def test_client_that_shuts_its_writing_side_still_gets_its_answers(client: LoopClient) -> None:
    import socket

    client.send('{"execute":"query-version"}{"execute":"query-commands"}')
    client.sock.shutdown(socket.SHUT_WR)
    assert "return" in client.receive()
    assert "return" in client.receive()
    client.wait_for_end()


def test_client_that_reads_nothing_is_not_read_beyond_the_bound(
    ctx: AioContext, client: LoopClient, server: QmpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "OUTPUT_BYTES_MAX", 4096)
    client.stall()
    sent = 0
    request = b'{"execute":"query-commands"}'
    idle_rounds = 0
    while idle_rounds < 3:
        try:
            sent += client.sock.send(request)
            idle_rounds = 0
        except BlockingIOError:
            idle_rounds += 1
        ctx.poll(blocking=False)
    (held,) = server.monitors
    assert len(held._requests) < sent // len(request)
    assert len(held._output) < 4096 + 65536
    client.listen()
    for _ in range(sent // len(request)):
        assert "return" in client.receive()


def test_bug_in_a_command_is_told_and_logged_and_the_server_lives(
    ctx: AioContext, daemon: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(session: Session, arguments: Any) -> Any:
        raise KeyError("oops")

    session = Session(daemon, {"broken": Command("broken", broken)}, negotiated=True)
    response = ctx.run(dispatch.respond(session, b'{"execute":"broken"}'))
    assert response["error"]["desc"] == "internal error: KeyError: 'oops'"
    assert "oops" in caplog.text


def test_query_commands_names_every_command(client: LoopClient) -> None:
    names = [entry["name"] for entry in client.execute("query-commands")["return"]]
    assert names == list(COMMANDS)


def test_quit_is_answered_and_stops_the_daemon(client: LoopClient, daemon: Any) -> None:
    assert client.execute("quit") == {"return": {}}
    assert daemon.stop_count == 1


def test_query_block_exports_without_any_is_empty(client: LoopClient) -> None:
    assert client.execute("query-block-exports") == {"return": []}


def test_export_stats_without_any_export_are_empty(client: LoopClient) -> None:
    assert client.execute("x-query-export-stats") == {"return": []}


def test_export_stats_tell_each_operation(client: LoopClient, daemon: Any) -> None:
    statistics = ExportStatistics()
    statistics.count(1, 4096, 0, 1000)
    statistics.count(1, 4096, 5, 3000)
    export = SimpleNamespace(name="disk", id="disk", statistics=statistics)
    daemon.exports.add(export)
    (export,) = client.execute("x-query-export-stats")["return"]
    assert (export["id"], export["faults"]) == ("disk", 0)
    figures = {operation.pop("operation"): operation for operation in export["operations"]}
    assert list(figures) == ["read", "write", "flush", "trim", "write-zeroes"]
    assert set(figures["read"].values()) == {0}
    assert figures["write"] == {
        "requests": 2,
        "bytes": 4096,
        "errors": 1,
        "latency-mean-ns": 2000,
        "latency-p50-ns": 1023,
        "latency-p99-ns": 4054,
        "latency-p999-ns": 4090,
    }


def test_metadata_memory_tells_the_bound_and_each_nodes_parts(
    client: LoopClient, daemon: Any
) -> None:
    daemon.opener.metadata_budget = budget = MetadataBudget(1000)
    share = budget.new_share()
    share.reserve("l2-cache", 600)
    share.parts["l2-cache"].used = lambda: 512
    driver, plain = SimpleNamespace(metadata_share=share), SimpleNamespace(metadata_share=None)
    daemon.opener.nodes = {
        "a": SimpleNamespace(node_name="a", driver=driver),
        "b": SimpleNamespace(node_name="b", driver=plain),
    }
    part = {"part": "l2-cache", "bytes-max": 600, "bytes-used": 512}
    assert client.execute("x-query-metadata-memory")["return"] == {
        "bytes-max": 1000,
        "bytes-granted": 600,
        "nodes": [{"node-name": "a", "parts": [part]}],
    }


def test_query_iothreads_without_any_is_empty(client: LoopClient) -> None:
    assert client.execute("query-iothreads") == {"return": []}


def test_query_named_block_nodes_without_any_is_empty(client: LoopClient) -> None:
    assert client.execute("query-named-block-nodes", {"flat": True}) == {"return": []}
