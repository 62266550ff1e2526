# SPDX-License-Identifier: Apache-2.0
# What the header in native/ declares, for the type checker.
from contextlib import AbstractContextManager
from typing import Any

class _Library:
    @staticmethod
    def xts_mask(
        tweaks: Any, sectors: int, sector_bytes: int, source: Any, target: Any, /
    ) -> None: ...

class _ForeignInterface:
    def from_buffer(self, buffer: Any, /) -> AbstractContextManager[Any]: ...

lib: _Library
ffi: _ForeignInterface
