# SPDX-License-Identifier: Apache-2.0
"""The control socket: QEMU's machine protocol, JSON over a stream socket.

A request goes the way of the files: `json_stream` cuts the bytes into values, `monitor` queues them
for one connection, `dispatch` finds the command and checks its arguments against its dataclass
(`schema`), and a function under `commands/` does the work and returns what is to be shown.
"""
