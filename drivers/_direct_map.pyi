# SPDX-License-Identifier: Apache-2.0
# What the header in native/ declares, for the type checker.
from typing import Any

class _Pin:
    serial: int

class _Table:
    count: int
    capacity: int

class _Map:
    fd: int
    io: int
    held: int
    durable: int
    page_bits: int
    alignment_mask: int
    memory_mask: int
    length: int
    pages: _Table
    slices: _Table
    serial: int
    watched: int
    token: int

class _Library:
    MAP_IO_INLINE: int
    MAP_IO_NOWAIT: int
    MAP_IO_AIO: int
    @staticmethod
    def direct_map_open(
        fd: int,
        io: int,
        page_bits: int,
        length: int,
        request_alignment: int,
        memory_alignment: int,
        durable: int,
        /,
    ) -> _Map: ...
    @staticmethod
    def direct_map_close(map: _Map, /) -> None: ...
    @staticmethod
    def direct_map_publish(map: _Map, page: int, value: int, /) -> int: ...
    @staticmethod
    def direct_map_withdraw(map: _Map, first: int, last: int, /) -> None: ...
    @staticmethod
    def direct_map_clear(map: _Map, /) -> None: ...
    @staticmethod
    def direct_map_set_words(
        map: _Map, slice_bits: int, word_mask: int, word_plain: int, /
    ) -> None: ...
    @staticmethod
    def direct_map_show(map: _Map, number: int, address: int, host_end: int, /) -> int: ...
    @staticmethod
    def direct_map_hide(map: _Map, number: int, address: int, /) -> None: ...
    @staticmethod
    def direct_map_hide_all(map: _Map, /) -> None: ...
    @staticmethod
    def direct_map_was_used(map: _Map, number: int, address: int, /) -> int: ...
    @staticmethod
    def direct_map_find(map: _Map, offset: int, length: int, writable: int, /) -> int: ...
    @staticmethod
    def direct_map_pin(map: _Map, pin: _Pin, /) -> None: ...
    @staticmethod
    def direct_map_unpin(map: _Map, pin: _Pin, /) -> int: ...
    @staticmethod
    def direct_map_oldest(map: _Map, /) -> int: ...

class _ForeignInterface:
    NULL: Any
    def new(self, declaration: str, init: Any = ..., /) -> Any: ...
    def cast(self, declaration: Any, value: Any, /) -> Any: ...
    def gc(self, cdata: Any, destructor: Any, /) -> Any: ...

lib: _Library
ffi: _ForeignInterface
