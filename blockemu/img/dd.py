# SPDX-License-Identifier: Apache-2.0
"""`img dd`: a part of one image into a new one. It is `convert` with a window on its source.

`count` is where reading stops, counted from the image's start: of `count=5 skip=2` three blocks
come out. That isn't dd(1), but it is what qemu-img 7.2 does, and scripts rely on sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import parse_size
from blockemu.drivers.sector import sectors_up
from blockemu.img.convert import ConvertRequest, convert_opened
from blockemu.img.session import open_window, run_session
from blockemu.loop.host_file import PosixFiles

if TYPE_CHECKING:
    from blockemu.drivers.registry import Opener

BLOCK_BYTES: Final = 512
"""bs, if it isn't given."""

BLOCK_BYTES_MAX: Final = 2**31 - 1

_SIZES: Final = ("bs", "count", "skip")
_FILES: Final = ("if", "of")


@dataclass(frozen=True, slots=True, kw_only=True)
class DdRequest:
    """`count_blocks` None: up to the end."""

    source: str
    target: str
    source_fmt: str | None = None
    target_fmt: str = "raw"
    block_bytes: int = BLOCK_BYTES
    count_blocks: int | None = None
    skip_blocks: int = 0
    force_share: bool = False

    @classmethod
    def from_operands(
        cls,
        operands: Sequence[str],
        *,
        source_fmt: str | None,
        target_fmt: str,
        force_share: bool,
    ) -> DdRequest:
        """From words such as `bs=1M`. Raises: ImageError."""
        found = _Operands()
        for operand in operands:
            found.take(operand)
        for key in _FILES:
            if key not in found.files:
                raise ImageError(f"{key}=", "is missing: both if=INPUT and of=OUTPUT are needed")
        block_bytes = found.sizes.get("bs", BLOCK_BYTES)
        if not 1 <= block_bytes <= BLOCK_BYTES_MAX:
            raise ImageError("bs=", f"is between 1 and {BLOCK_BYTES_MAX}, not {block_bytes}")
        return cls(
            source=found.files["if"],
            target=found.files["of"],
            source_fmt=source_fmt,
            target_fmt=target_fmt,
            block_bytes=block_bytes,
            count_blocks=found.sizes.get("count"),
            skip_blocks=found.sizes.get("skip", 0),
            force_share=force_share,
        )

    def window(self, length_bytes: int) -> tuple[int, int]:
        """Offset and length of what is copied of a disk of that length. Raises: ImageError."""
        start = self.skip_blocks * self.block_bytes
        if start > sectors_up(length_bytes):
            raise ImageError(
                self.source, f"has {length_bytes} bytes: {start} of them can't be skipped"
            )
        end = length_bytes
        if self.count_blocks is not None:
            end = min(end, self.count_blocks * self.block_bytes)
        start = min(start, length_bytes)
        return start, max(end - start, 0)


@dataclass(slots=True)
class _Operands:
    sizes: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def take(self, operand: str) -> None:
        key, equals, value = operand.partition("=")
        if not equals or key not in (*_SIZES, *_FILES):
            known = ", ".join(f"{key}=" for key in (*_SIZES, *_FILES))
            raise ImageError(operand, f"no operand of dd; known: {known}")
        if key in _FILES:
            self.files[key] = value
            return
        try:
            self.sizes[key] = parse_size(value)
        except ValueError as error:
            raise ImageError(f"{key}=", str(error)) from error


def copy_part(request: DdRequest) -> None:
    """Make the target, and copy; a target that was made is removed if that fails.

    Context: the main thread, in which no loop runs. Raises: ImageError; KeyboardInterrupt.
    """
    conversion = ConvertRequest(
        sources=[request.source], target=request.target, target_fmt=request.target_fmt
    )

    async def work(opener: Opener) -> None:
        async with open_window(
            opener,
            request.source,
            fmt=request.source_fmt,
            choose=request.window,
            force_share=request.force_share,
        ) as source:
            await convert_opened(opener, conversion, [source], lambda done, total: None)

    run_session(work, files=PosixFiles(bulk=True))
