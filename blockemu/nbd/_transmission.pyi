# SPDX-License-Identifier: Apache-2.0
# What native/transmission.h declares, for the type checker.
from collections.abc import Sequence
from typing import Any

class NativeCounters:
    requests: int
    bytes: int
    failures: int
    latency_ns: int
    latency: Sequence[int]

class NativeStatistics:
    reads: NativeCounters
    writes: NativeCounters
    flushes: NativeCounters
    faults: int

class _Fault:
    offset: int
    address: int
    length: int
    cookie: int
    command: int
    flags: int
    retry: int
    dropped: int
    error: int

class _Library:
    NBD_FAULT: int
    NBD_END: int
    NBD_DISCONNECT: int
    NBD_BAD_MAGIC: int
    NBD_TOO_LONG: int
    NBD_RECEIVE_FAILED: int
    NBD_SEND_FAILED: int
    NBD_ANSWERED: int
    NBD_RELEASED: int
    NBD_STYLE_SIMPLE: int
    NBD_STYLE_STRUCTURED: int
    NBD_STYLE_EXTENDED: int
    NBD_LATENCY_BUCKETS: int
    @staticmethod
    def nbd_open(
        poll: Any, fd: int, token: int, limits: Any, statistics: NativeStatistics, style: int, /
    ) -> Any: ...
    @staticmethod
    def nbd_set_map(connection: Any, map: Any, writable: int, /) -> None: ...
    @staticmethod
    def nbd_set_quiet(connection: Any, quiet: int, /) -> None: ...
    @staticmethod
    def nbd_resume(connection: Any, /) -> None: ...
    @staticmethod
    def nbd_describe(request: Any, fault: _Fault, /) -> None: ...
    @staticmethod
    def nbd_finish(request: Any, /) -> None: ...
    @staticmethod
    def nbd_answer(request: Any, parts: Any, count: int, /) -> int: ...
    @staticmethod
    def nbd_stop(connection: Any, /) -> None: ...
    @staticmethod
    def nbd_close(connection: Any, /) -> None: ...
    @staticmethod
    def nbd_free(connection: Any, /) -> None: ...
    @staticmethod
    def nbd_is_busy(connection: Any, /) -> int: ...

class _ForeignInterface:
    NULL: Any
    def new(self, declaration: str, init: Any = ..., /) -> Any: ...
    def buffer(self, cdata: Any, size: int = ..., /) -> Any: ...
    def from_buffer(self, data: Any, /) -> Any: ...
    def cast(self, declaration: Any, value: Any, /) -> Any: ...
    def typeof(self, declaration: str, /) -> Any: ...

lib: _Library
ffi: _ForeignInterface
