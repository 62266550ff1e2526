# SPDX-License-Identifier: Apache-2.0
# What the headers of the native poll declare, as far as Python uses it, for the type checker.
from typing import Any, overload

class _Poll:
    epoll_fd: int
    external_disabled: int
    ready_count: int
    event_count: int
    handler_count: int
    ready: Any
    events: Any
    aio: Any
    poll_ns: int
    poll_io_ns: int
    poll_max_ns: int
    poll_grow: int
    poll_shrink: int
    sleeps: int
    passes: int
    spins_hit: int
    spins_missed: int

class _Library:
    @staticmethod
    def native_poll_open(result: Any, /) -> int: ...
    @staticmethod
    def native_poll_close(poll: _Poll, /) -> None: ...
    @staticmethod
    def native_poll_watch(poll: _Poll, fd: int, before: int, events: int, /) -> int: ...
    @staticmethod
    def native_poll_wait(poll: _Poll, timeout_ns: int, /) -> int: ...
    @staticmethod
    def native_poll_has_work(poll: _Poll, /) -> int: ...
    @staticmethod
    def native_poll_silence(poll: _Poll, silent: int, /) -> None: ...
    @staticmethod
    def native_poll_add_token(poll: _Poll, /) -> int: ...
    @staticmethod
    def native_poll_remove_token(poll: _Poll, /) -> None: ...
    @staticmethod
    def native_poll_open_aio(poll: _Poll, depth: int, /) -> int: ...

class _ForeignInterface:
    NULL: Any
    def new(self, declaration: str, init: Any = ..., /) -> Any: ...
    def buffer(self, cdata: Any, size: int = ..., /) -> Any: ...
    def cast(self, declaration: Any, value: Any, /) -> Any: ...
    def offsetof(self, declaration: str, field: str, /) -> int: ...
    def sizeof(self, declaration: str, /) -> int: ...
    def typeof(self, declaration: str, /) -> Any: ...
    @overload
    def from_buffer(self, view: Any, /) -> Any: ...
    @overload
    def from_buffer(self, declaration: str, view: Any, /) -> Any: ...

lib: _Library
ffi: _ForeignInterface
