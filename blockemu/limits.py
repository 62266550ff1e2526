# SPDX-License-Identifier: Apache-2.0
"""Bounds on everything that a client controls: each with a name, a default, and the reason for it.

They are chosen at start and handed down, never read from a global, so that two daemons in one
process, and every test, can have their own.

What one connection may cost, by these: its receive buffer (512 KiB, of which only touched pages
count) and `in_flight_bytes_max` of request data, whether it is being read, written, or waiting to
be sent. In negotiation: `option_length_max` and one reply.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockemu.loop.socket_options import KeepAlive

KIB = 1024
MIB = 1024 * KIB
SECOND_NS = 1_000_000_000

KEEPALIVE_SECONDS_MAX = 32767
"""Linux takes no longer times for TCP's keep-alive."""

KEEPALIVE_PROBES_MAX = 127
"""The same for how often it asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All limits of the daemon. The defaults suit a machine that serves a few busy disks."""

    connections_max: int = 2048
    """Client connections at once. Beyond it nobody is accepted until one leaves: they wait in the
    kernel's backlog. Each costs a file descriptor and, when active, up to about a megabyte."""

    export_connections_max: int = 1024
    """Clients of one export at once, unless the export has a bound of its own: so that one that
    everybody wants leaves room for the others. Beyond it, clients are told so when they choose it
    (ERR_POLICY)."""

    negotiation_time_max_ns: int = 10 * SECOND_NS
    """From accept to the transmission phase. Real clients need milliseconds; TLS, one day, less
    than a second on a bad line."""

    negotiation_bytes_max: int = 1 * MIB
    """What a client may send before it has chosen an export. `nbdinfo --list` asks for each export
    by name: some 10,000 of those fit."""

    option_length_max: int = 16 * KIB
    """Data of one option. The longest that is legal here holds one name and a list of information
    requests; four times a name leaves room for lists of meta contexts."""

    name_length_max: int = 4096
    """Bytes of an export's name or description: the longest string that the protocol allows."""

    meta_queries_max: int = 128
    """Queries of one LIST_META_CONTEXT or SET_META_CONTEXT, and so the contexts that a client may
    choose, each of which is a chunk of every answer. Clients know a handful of names."""

    status_reply_bytes_max: int = 1 * MIB
    """Extents in the answer to one BLOCK_STATUS, of all contexts together: 131072 extents, as
    QEMU's bound; twice what 4 GiB in clusters of 64 KiB can have. The protocol allows eight times
    as much, which would keep a client waiting for the first of them."""

    status_turns_max: int = 256
    """Turns, each of less than about a millisecond, that one BLOCK_STATUS may take: a million
    clusters looked at. Then the answer ends, and the client asks for the rest."""

    request_length_max: int = 32 * MIB
    """Data of one READ or WRITE. The protocol asks servers to take at least this much."""

    discard_length_max: int = 64 * MIB
    """Payload of a refused WRITE that is read and dropped so that the connection can go on. Beyond
    it the client lies or floods, and the connection is closed."""

    in_flight_requests_max: int = 128
    """Requests of one connection that are being served. The deepest queues that clients use by
    default are 64 (libnbd) and 128 (the kernel)."""

    in_flight_bytes_max: int = 64 * MIB
    """Request data of one connection that is held in memory: being read, being written, or not sent
    yet. Two requests of the largest size, so that one can be sent while the next is read."""

    unsent_bytes_max: int = 4 * MIB
    """Replies that may wait for a client that is slow to take them before no more of its requests
    are begun. Enough that the disk has work while a batch of large replies is on its way; little
    enough that a client that never reads costs little."""

    unsent_parts_max: int = 512
    """The same bound for small replies, counted in heads and payloads."""

    round_requests_max: int = 128
    """Requests of one connection begun in one round of the loop, after which others get their turn.
    At 10 us each a neighbour waits for about a millisecond."""

    round_bytes_max: int = 2 * MIB
    """Request data moved for one connection in one round: also about a millisecond of copying."""

    memory_bytes_max: int = 1024 * MIB
    """Request data of all connections together, beyond what each has for itself
    (`memory_reserve_bytes`). Sixteen clients with full queues of large requests; more of them take
    turns (nbd/memory_budget.py)."""

    memory_reserve_bytes: int = 256 * KIB
    """Request data of one connection that is never in question: a client with small requests goes
    on, whatever the others do. Half a gigabyte for all clients that may be connected."""

    unread_time_max_ns: int = 120 * SECOND_NS
    """A client that takes nothing of its replies for so long is dropped: its requests hold memory
    that others wait for. Long enough for one that is stopped for a moment by its user, or for a
    virtual machine that is moved to another host."""

    close_linger_ns: int = 5 * SECOND_NS
    """After DISC or at shutdown, the time that a client has to take the replies that it is owed."""

    close_silence_ns: int = SECOND_NS // 4
    """When the server has hung up, the time after which a client that sends nothing and doesn't
    close either is left. Real clients close as soon as they see the end of the stream, but an idle
    one may not look. Longer than most round trips; what such clients may add to a shutdown. Also
    what one has then that is in the middle of an option, to send the rest and hear the answer."""

    remote_linger_ns: int = 10 * SECOND_NS
    """At shutdown, the time that NBD servers below us have to answer what was asked of them, before
    it fails and the daemon ends with an error. Longer than clients are waited for; a stop ends
    well before a service manager loses its patience (systemd: 90 s)."""

    accepts_per_round_max: int = 16
    """Connections accepted in one round of the main loop, so that a flood of them leaves it time
    for everything else."""

    keepalive_idle_ns: int = 60 * SECOND_NS
    """After so long without a word from a TCP client, the kernel asks whether it still lives: a
    machine that lost its power or its network holds a place, and the memory of its requests, for
    ever otherwise. The kernel's own default is two hours. Whole seconds."""

    keepalive_interval_ns: int = 10 * SECOND_NS
    """Between one such question and the next, while there is no answer."""

    keepalive_probes_max: int = 6
    """Questions without an answer, after which the client is taken for gone: after two minutes,
    which a switch or a router takes to start again."""

    @property
    def keepalive(self) -> KeepAlive:
        """As the kernel takes them."""
        return KeepAlive(
            idle_s=max(1, self.keepalive_idle_ns // SECOND_NS),
            interval_s=max(1, self.keepalive_interval_ns // SECOND_NS),
            probes=self.keepalive_probes_max,
        )

    def payload_dropped_max(self, *, extended: bool) -> int:
        """The longest payload that is dropped with an error. With extended headers the document
        wants those beyond the largest that was announced to end the connection."""
        return self.request_length_max if extended else self.discard_length_max

    def __post_init__(self) -> None:
        """Raises: ValueError, when two of them contradict each other."""
        for less, more in (
            ("request_length_max", "in_flight_bytes_max"),
            ("status_reply_bytes_max", "in_flight_bytes_max"),
            ("in_flight_bytes_max", "memory_bytes_max"),
            ("memory_reserve_bytes", "in_flight_bytes_max"),
            ("name_length_max", "option_length_max"),
            ("option_length_max", "negotiation_bytes_max"),
        ):
            if getattr(self, less) > getattr(self, more):
                raise ValueError(
                    f"{less} ({getattr(self, less)}) is more than {more} ({getattr(self, more)})"
                )
        for name in ("keepalive_idle_ns", "keepalive_interval_ns"):
            if getattr(self, name) > KEEPALIVE_SECONDS_MAX * SECOND_NS:
                raise ValueError(f"{name} is more than {KEEPALIVE_SECONDS_MAX} seconds")
        if self.keepalive_probes_max > KEEPALIVE_PROBES_MAX:
            raise ValueError(f"keepalive_probes_max is more than {KEEPALIVE_PROBES_MAX}")
