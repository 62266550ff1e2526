# SPDX-License-Identifier: Apache-2.0
"""Floor 1: the event loop, coroutines, threads, and host file I/O. It knows nothing of blocks."""
