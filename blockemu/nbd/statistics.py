# SPDX-License-Identifier: Apache-2.0
"""What an export's clients have asked for, and how long it took: counted here and in C, shown as
one.

Only ever grows. Python counts what it answers; the native part counts what it answers in a struct
of its own (native/transmission.h), which this module adds when somebody asks. So no request counts
twice, whoever serves it in the end, and nobody pays for a lock.

A latency is the time from a request's parsing to its answer in the queue of replies; the client
sees more, since its reply has to travel. It is kept as a histogram of powers of two, and quantiles
are found by a straight line through their bucket: right to a factor of two in the worst case, and
good to see a tail by. Plain requests that Python answers on the spot share the time of their batch
in equal parts: a look at the clock for each would cost more than the counting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from blockemu.drivers.nbd.protocol import Command

if TYPE_CHECKING:
    from blockemu.nbd._transmission import NativeCounters, NativeStatistics

LATENCY_BUCKETS: Final = 40
"""[n] counts what took less than 2**n ns and no less than half of it; the last one all the rest,
from nine minutes on."""


class Counters:
    """Of one operation. Context: home thread of the export's ctx; any thread may look."""

    __slots__ = ("bytes", "errors", "latency", "latency_ns", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0
        self.errors = 0
        self.latency_ns = 0
        self.latency = [0] * LATENCY_BUCKETS

    def count_one(self, data_bytes: int, took_ns: int) -> None:
        """A request ended well."""
        self.requests += 1
        self.bytes += data_bytes
        self.latency_ns += took_ns
        bucket = took_ns.bit_length()
        self.latency[bucket if bucket < LATENCY_BUCKETS else -1] += 1

    def count_batch(self, requests: int, data_bytes: int, took_ns: int) -> None:
        """So many requests ended well, which moved so much in sum and took so long in sum."""
        self.requests += requests
        self.bytes += data_bytes
        self.latency_ns += took_ns
        bucket = (took_ns // requests).bit_length()
        self.latency[bucket if bucket < LATENCY_BUCKETS else -1] += requests


@dataclass(frozen=True, slots=True)
class OperationSnapshot:
    """Of one operation, at one moment. Latencies are 0 where there was no request."""

    requests: int
    bytes: int
    """Asked for by the requests that ended well."""
    errors: int
    """Requests that were answered with an error; they count as requests, too."""
    latency_mean_ns: int
    latency_p50_ns: int
    latency_p99_ns: int
    latency_p999_ns: int


@dataclass(frozen=True, slots=True)
class ExportSnapshot:
    """Of one export, at one moment."""

    operations: dict[str, OperationSnapshot]
    """By name: read, write, flush, trim, write-zeroes."""
    faults: int
    """Requests that the native part gave to Python, which counted them as all it answers."""


class ExportStatistics:
    """Of all connections that an export ever had."""

    __slots__ = ("flushes", "native", "of_command", "reads", "trims", "writes", "zeroes")

    def __init__(self) -> None:
        self.reads = Counters()
        self.writes = Counters()
        self.flushes = Counters()
        self.trims = Counters()
        self.zeroes = Counters()
        self.of_command = {
            int(Command.NBD_CMD_READ): self.reads,
            int(Command.NBD_CMD_WRITE): self.writes,
            int(Command.NBD_CMD_FLUSH): self.flushes,
            int(Command.NBD_CMD_TRIM): self.trims,
            int(Command.NBD_CMD_WRITE_ZEROES): self.zeroes,
        }
        self.native: NativeStatistics | None = None
        """A `struct nbd_statistics`, made with the first connection that C serves."""

    def count(self, command: int, length: int, error: int, took_ns: int) -> None:
        """A request was answered. One of an unknown command counts nowhere."""
        counters = self.of_command.get(command)
        if counters is None:
            return
        counters.requests += 1
        if error:
            counters.errors += 1
        else:
            counters.bytes += length
        counters.latency_ns += took_ns
        bucket = took_ns.bit_length()
        counters.latency[bucket if bucket < LATENCY_BUCKETS else -1] += 1

    def snapshot(self) -> ExportSnapshot:
        """All figures as they are now, or nearly: other threads may be counting.

        Context: any thread.
        """
        native = self.native
        none: dict[str, NativeCounters] = {}
        by_c = (
            none
            if native is None
            else {"read": native.reads, "write": native.writes, "flush": native.flushes}
        )
        by_python = {
            "read": self.reads,
            "write": self.writes,
            "flush": self.flushes,
            "trim": self.trims,
            "write-zeroes": self.zeroes,
        }
        return ExportSnapshot(
            {name: _sum(counters, by_c.get(name)) for name, counters in by_python.items()},
            0 if native is None else native.faults,
        )


def _sum(python: Counters, native: NativeCounters | None) -> OperationSnapshot:
    requests, data_bytes, latency_ns = python.requests, python.bytes, python.latency_ns
    latency: Iterable[Any] = python.latency
    if native is not None:
        requests += native.requests
        data_bytes += native.bytes
        latency_ns += native.latency_ns
        latency = map(sum, zip(python.latency, native.latency, strict=True))
    histogram = [*latency]
    return OperationSnapshot(
        requests=requests,
        bytes=data_bytes,
        errors=python.errors,
        latency_mean_ns=latency_ns // requests if requests else 0,
        latency_p50_ns=quantile_ns(histogram, 0.5),
        latency_p99_ns=quantile_ns(histogram, 0.99),
        latency_p999_ns=quantile_ns(histogram, 0.999),
    )


def quantile_ns(histogram: Sequence[int], share: float) -> int:
    """What this share of the requests took at most, by a straight line through its bucket."""
    rank = share * sum(histogram)
    before = 0
    for bucket, count in enumerate(histogram):
        if count and before + count >= rank:
            low, high = (1 << bucket) // 2, (1 << bucket) - 1
            return low + int((high - low) * (rank - before) / count)
        before += count
    return 0
