# SPDX-License-Identifier: Apache-2.0
"""What is counted, and what quantiles are made of it."""

from __future__ import annotations

import pytest

from blockemu.drivers.nbd.protocol import Command, CommandFlag
from blockemu.loop.clock import VirtualClock
from blockemu.nbd.statistics import (
    LATENCY_BUCKETS,
    ExportStatistics,
    OperationSnapshot,
    quantile_ns,
)
from tests.unit.nbd.conftest import DISK_BYTES, Serve, Served

READ = Command.NBD_CMD_READ
WRITE = Command.NBD_CMD_WRITE
FLUSH = Command.NBD_CMD_FLUSH
TRIM = Command.NBD_CMD_TRIM
WRITE_ZEROES = Command.NBD_CMD_WRITE_ZEROES
NOTHING = OperationSnapshot(0, 0, 0, 0, 0, 0, 0)

both_paths = pytest.mark.parametrize("mapped", [False, True], ids=["graph", "map"])


def counted(served: Served, name: str) -> tuple[int, int, int]:
    """Requests, bytes and errors of an operation."""
    operation = served.export.statistics.snapshot().operations[name]
    return operation.requests, operation.bytes, operation.errors


def test_a_quantile_lies_in_the_bucket_of_its_request() -> None:
    histogram = [0] * LATENCY_BUCKETS
    histogram[10] = 98  # 512 to 1023 ns
    histogram[20] = 2
    assert 512 <= quantile_ns(histogram, 0.5) <= 1023
    assert 512 <= quantile_ns(histogram, 0.98) <= 1023
    assert 2**19 <= quantile_ns(histogram, 0.99) < 2**20
    assert quantile_ns(histogram, 1.0) == 2**20 - 1


def test_a_quantile_of_nothing_is_nothing() -> None:
    assert quantile_ns([0] * LATENCY_BUCKETS, 0.99) == 0


@pytest.mark.parametrize("took_ns", [0, 1, 2, 1023, 1024, 2**39 - 1, 2**39, 2**70])
def test_every_latency_has_its_bucket(took_ns: int) -> None:
    statistics = ExportStatistics()
    statistics.count(READ, 1, 0, took_ns)
    statistics.writes.count_batch(2, 2, 2 * took_ns)
    operations = statistics.snapshot().operations
    for name in ("read", "write"):
        assert operations[name].latency_mean_ns == took_ns
        if took_ns < 2**39:
            assert took_ns <= operations[name].latency_p999_ns * 2 <= max(4 * took_ns, 0)


@both_paths
def test_each_operation_counts_its_own(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    client = served.client
    for i in range(3):
        client.request(READ, offset=i * 512, length=512)
        client.reply(512)
    client.request(WRITE, payload=b"x" * 100)
    client.reply()
    for command, length in ((FLUSH, 0), (TRIM, 4096), (WRITE_ZEROES, 8192)):
        client.request(command, length=length)
        client.reply()
    assert counted(served, "read") == (3, 1536, 0)
    assert counted(served, "write") == (1, 100, 0)
    assert counted(served, "flush") == (1, 0, 0)
    assert counted(served, "trim") == (1, 4096, 0)
    assert counted(served, "write-zeroes") == (1, 8192, 0)


def test_a_batch_counts_each_request(serve: Serve) -> None:
    served = serve(mapped=True)
    client = served.client
    read = client.header(READ, length=512)
    write = client.header(WRITE, length=64) + bytes(64)
    client.send((read + write) * 10)
    for length in (512, 0) * 10:
        client.reply(length)
    assert counted(served, "read") == (10, 5120, 0)
    assert counted(served, "write") == (10, 640, 0)


def test_host_io_that_is_pending_counts_when_it_ends(serve: Serve, clock: VirtualClock) -> None:
    served = serve(mapped=True)
    served.backend.file.behaviour = "pending"
    served.client.request(READ, length=512)
    served.client.until(lambda: len(served.backend.file.pending) == 1)
    assert served.export.statistics.snapshot().operations["read"] == NOTHING
    clock.advance_ns(1000)
    served.backend.file.complete()
    served.client.reply(512)
    assert counted(served, "read") == (1, 512, 0)
    assert served.export.statistics.snapshot().operations["read"].latency_mean_ns == 1000


@both_paths
def test_errors_are_counted_and_their_bytes_are_not(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    served.client.request(READ, offset=DISK_BYTES, length=512)
    served.client.reply()
    served.client.request(WRITE, flags=CommandFlag.NBD_CMD_FLAG_DF, payload=b"x" * 512)
    served.client.reply()
    served.backend.fail("flush", 5)
    served.client.request(FLUSH)
    served.client.reply()
    assert counted(served, "read") == (1, 0, 1)
    assert counted(served, "write") == (1, 0, 1)
    assert counted(served, "flush") == (1, 0, 1)


def test_an_unknown_command_counts_nowhere(serve: Serve) -> None:
    served = serve()
    served.client.request(99, length=512)
    served.client.reply()
    assert set(served.export.statistics.snapshot().operations.values()) == {NOTHING}


def test_a_lost_clients_requests_dont_count(serve: Serve) -> None:
    served = serve()
    served.backend.held = True
    served.client.request(READ, length=512)
    served.client.until(lambda: len(served.backend.waiting) == 1)
    served.connection.drop("the test wants it")
    served.backend.end()
    served.until_closed()
    assert counted(served, "read") == (0, 0, 0)


def test_connections_of_one_export_count_together(serve: Serve) -> None:
    first = serve(mapped=True)
    second = serve(mapped=True, export=first.export, backend=first.backend)
    for served in (first, second):
        served.client.request(READ, length=512)
        served.client.reply(512)
    assert counted(first, "read") == (2, 1024, 0)
