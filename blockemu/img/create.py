# SPDX-License-Identifier: Apache-2.0
"""`img create`: what the user typed becomes one request, and the create job carries it out.

The rules about backing files are qemu-img's: the format must be given, the size may be taken from
it, and it has to be there, unless the user says that it needn't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import path_to_create, resolve
from blockemu.drivers.options import parse_size
from blockemu.drivers.registry import Opener
from blockemu.img.options import OptionValue, format_options, formatting_line, parse_options
from blockemu.img.session import CACHE_MODES, finish, run_session
from blockemu.jobs.create import CreateJob, NewImage
from blockemu.loop.host_file import FileEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRequest:
    """Options under qemu-img's names, `size` and `backing_file` among them."""

    path: str
    fmt: str
    options: dict[str, OptionValue]
    unsafe_backing: bool = False

    @classmethod
    def from_user(
        cls,
        path: str,
        size: str | None,
        *,
        fmt: str = "raw",
        option_texts: Sequence[str] = (),
        backing_file: str | None = None,
        backing_fmt: str | None = None,
        unsafe_backing: bool = False,
    ) -> CreateRequest:
        """Check what a user typed, as far as that goes without opening anything.

        Raises: ImageError.
        """
        path_to_create(path)
        options = parse_options(path, fmt, option_texts)
        known = {spec.name for spec in format_options(path, fmt)}
        for key, value in (("backing_file", backing_file), ("backing_fmt", backing_fmt)):
            if value is not None:
                if key not in known:
                    raise ImageError(path, f"format {fmt} has no backing files")
                options[key] = value
        if size is not None:
            if "size" in options:
                raise ImageError(path, "the size is given twice, as SIZE and as an option")
            try:
                options["size"] = parse_size(size)
            except ValueError as error:
                raise ImageError(path, str(error)) from error
        request = cls(path=path, fmt=fmt, options=options, unsafe_backing=unsafe_backing)
        request._check_backing()
        return request

    @property
    def backing_file(self) -> str | None:
        """The name as it will stand in the image."""
        value = self.options.get("backing_file")
        return str(value) if value else None

    @property
    def backing_fmt(self) -> str | None:
        """The backing file's format."""
        value = self.options.get("backing_fmt")
        return str(value) if value else None

    def _check_backing(self) -> None:
        if self.backing_file is None:
            if self.backing_fmt is not None:
                raise ImageError(self.path, "a backing format without a backing file")
            if "size" not in self.options:
                raise ImageError(self.path, "a new image needs a size")
            return
        if self.backing_fmt is None:
            raise ImageError(
                self.path, "the backing file's format must be given (-F, or backing_fmt=)"
            )
        if self.backing_file == self.path:
            raise ImageError(self.path, "an image can't be its own backing file")
        if self.unsafe_backing and "size" not in self.options:
            raise ImageError(self.path, "a new image needs a size when its backing file isn't read")


def create_image(
    request: CreateRequest,
    *,
    announce: Callable[[str], None] = lambda line: None,
    files: FileEngine | None = None,
) -> None:
    """Create the image. `announce` is handed qemu-img's "Formatting" line before it begins.

    Context, and what an interrupt does: as `run_session`. Raises: ImageError.
    """
    run_session(lambda opener: run_create(request, opener, announce=announce), files=files)


async def run_create(
    request: CreateRequest,
    opener: Opener,
    *,
    announce: Callable[[str], None] = lambda line: None,
    cache: str = "writeback",
) -> None:
    """The create job for `request`, from its start to its end. `cache`: see session.py.

    Context: the opener's. Suspends: while the job runs. Raises: ImageError.
    """
    options = dict(request.options)
    if request.backing_file is not None and not request.unsafe_backing:
        backing_bytes = await _backing_size(request, opener)
        options.setdefault("size", backing_bytes)
    announce(formatting_line(request.path, request.fmt, options))
    size_bytes = options.pop("size")
    assert isinstance(size_bytes, int)
    job = CreateJob(
        "create",
        NewImage(
            path=path_to_create(request.path),
            fmt=request.fmt,
            size_bytes=size_bytes,
            options=options,
            cache=CACHE_MODES[cache],
        ),
        opener=opener,
    )
    await finish(job)


async def _backing_size(request: CreateRequest, opener: Opener) -> int:
    """The backing image's size; opening it is also how we know that it is there and sound."""
    assert request.backing_file is not None
    path = resolve(request.backing_file, above=request.path)
    try:
        node = await opener.open_image(
            path,
            fmt=request.backing_fmt,
            read_only=True,
            direct=False,
            aio="threads",
            force_share=True,
            no_io=True,
        )
    except ImageError as error:
        if error.name != path:
            raise
        raise ImageError(path, f"is the backing file of {request.path}: {error.reason}") from error
    try:
        return node.length_bytes
    finally:
        await node.close()
