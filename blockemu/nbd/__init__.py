# SPDX-License-Identifier: Apache-2.0
"""The NBD server: one file for each phase of a connection's life.

`handshake` holds the phase before an export is chosen, `transmission` the phase after, with
`intake` for requests, `request` for one that takes time, and `reply_queue` for replies. `server`
listens, and carries a connection from the one phase to the other. The wire format, and what reads
sockets, lie two floors below, in `drivers/nbd/`, where the client is.
"""
