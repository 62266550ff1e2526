# SPDX-License-Identifier: Apache-2.0
# What the header in native/ declares, for the type checker.
from typing import Any

class _Walk:
    odd: int
    offset_mask: int
    start: int
    end: int
    cluster_bytes: int
    runs_max: int
    runs: int
    is_data: int

class _Library:
    @staticmethod
    def plain_entries(walk: _Walk, words: Any, count: int, lengths: Any, /) -> int: ...

class _ForeignInterface:
    def new(self, declaration: str, init: Any = ..., /) -> Any: ...
    def from_buffer(self, declaration: str, buffer: Any, /) -> Any: ...
    def unpack(self, cdata: Any, length: int, /) -> list[int]: ...

lib: _Library
ffi: _ForeignInterface
