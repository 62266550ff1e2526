# SPDX-License-Identifier: Apache-2.0
"""The NBD server: one file for each phase of a connection's life.

`protocol` holds the wire format, `negotiation_stream` and `handshake` the phase before an export is
chosen, `transmission` the phase after, with `intake` and `receive_buffer` for requests, `request`
for one that takes time, and `reply_queue` for replies. `server` listens, and carries a connection
from the one phase to the other.
"""
