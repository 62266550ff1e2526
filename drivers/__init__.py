# SPDX-License-Identifier: Apache-2.0
"""Floor 2: block nodes and the drivers that give them meaning.

`node` is the choke point that every driver call goes through; `child`, `backend` and `drain` are
the edges, the doors and the quiet of the graph; `direct_map` is the short cut past it; `registry`
opens it. The rest is drivers: `file` at the bottom, `raw` and `qcow2` above it, `null`.

Knows floor 1 (`blockemu.loop`), and nothing of jobs, exports or NBD.
"""
