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

KIB = 1024
MIB = 1024 * KIB
SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All limits of the daemon. The defaults suit a machine that serves a few busy disks."""

    connections_max: int = 1024
    """Client connections at once. Beyond it nobody is accepted until one leaves: they wait in the
    kernel's backlog. Each costs a file descriptor and, when active, up to about a megabyte."""

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

    close_linger_ns: int = 5 * SECOND_NS
    """After DISC or at shutdown, the time that a client has to take the replies that it is owed."""

    close_silence_ns: int = SECOND_NS // 4
    """When the server has hung up, the time after which a client that sends nothing and doesn't
    close either is left. Real clients close as soon as they see the end of the stream, but an idle
    one may not look. Longer than most round trips; what such clients may add to a shutdown."""

    accepts_per_round_max: int = 16
    """Connections accepted in one round of the main loop, so that a flood of them leaves it time
    for everything else."""

    def payload_dropped_max(self, *, extended: bool) -> int:
        """The longest payload that is dropped with an error. With extended headers the document
        wants those beyond the largest that was announced to end the connection."""
        return self.request_length_max if extended else self.discard_length_max

    def __post_init__(self) -> None:
        assert self.in_flight_bytes_max >= self.request_length_max > 0
        assert self.in_flight_requests_max > 0
        assert self.name_length_max <= self.option_length_max <= self.negotiation_bytes_max
