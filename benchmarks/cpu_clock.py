# SPDX-License-Identifier: Apache-2.0
"""The CPU time of another process, to the nanosecond.

``/proc/PID/stat`` counts in ticks of 10 ms, and summing over threads misses those that have ended
(qemu's workers come and go). The kernel keeps one clock per process that counts all of it;
``clock_getcpuclockid`` gives its id for any pid, and Python's standard library lacks just that
call.
"""

from __future__ import annotations

import ctypes
import os
import time

_libc = ctypes.CDLL(None, use_errno=True)


def process_cpu_ns(pid: int) -> int:
    """CPU time used by `pid` since its start, by all its threads, also those that have ended.

    Raises: OSError when there is no such process.
    """
    clock_id = ctypes.c_int()
    error = _libc.clock_getcpuclockid(ctypes.c_int(pid), ctypes.byref(clock_id))
    if error:
        raise OSError(error, os.strerror(error))
    return time.clock_gettime_ns(clock_id.value)
