# SPDX-License-Identifier: Apache-2.0
"""`img resize`: a disk image made longer or shorter, by qemu-img's rules.

What a disk loses is lost, so shrinking has to be asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import parse_size
from blockemu.drivers.sector import sectors_up
from blockemu.img.session import open_image, run_session

if TYPE_CHECKING:
    from blockemu.drivers.registry import Opener

_OF_FORMAT: Final = {
    "raw": ("off", "falloc", "full"),
    "qcow2": ("off", "metadata", "falloc", "full"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeRequest:
    """`size`: as typed, with + or - in front for a change by so much."""

    path: str
    size: str
    fmt: str | None = None
    preallocation: str = "off"
    shrink: bool = False

    def new_length(self, old_length: int) -> int:
        """The size wanted for a disk of `old_length` bytes. Raises: ImageError."""
        sign = self.size[:1] if self.size[:1] in ("+", "-") else ""
        try:
            length = parse_size(self.size.removeprefix(sign))
        except ValueError as error:
            raise ImageError(self.path, str(error)) from error
        if sign:
            length = old_length + (length if sign == "+" else -length)
        if length <= 0:
            raise ImageError(self.path, f"a new size of {length} bytes is too small")
        return length

    def check(self, fmt: str, *, old_length: int, new_length: int) -> None:
        """Whether that may be done to an image of format `fmt`. Raises: ImageError."""
        if new_length < old_length and not self.shrink:
            raise ImageError(
                self.path,
                f"would lose all that lies behind byte {new_length}: say --shrink if it may",
            )
        if self.preallocation == "off":
            return
        if new_length <= old_length:
            raise ImageError(self.path, "--preallocation is for growing images")
        if self.preallocation not in _OF_FORMAT.get(fmt, ("off",)):
            raise ImageError(
                self.path, f"a {fmt} image can't grow with preallocation={self.preallocation}"
            )


def resize_image(request: ResizeRequest) -> None:
    """Carry the request out; the new size is durable at the end.

    Context: the main thread, in which no loop runs. Raises: ImageError.
    """

    async def work(opener: Opener) -> None:
        async with open_image(
            opener, request.path, fmt=request.fmt, writable=True, resizable=True
        ) as image:
            old = sectors_up(image.length_bytes)
            new = request.new_length(old)
            request.check(image.node.driver.name, old_length=old, new_length=new)
            await image.truncate(new, preallocation=request.preallocation)

    run_session(work)
