# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image on top of another, for as long as a process serves it: writes go there and are
thrown away with it.

Its file is removed as soon as it is open, so that it goes even if we are killed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import local_path
from blockemu.img.create import CreateRequest, create_image
from blockemu.img.session import run_session
from blockemu.listen import remove_file

FOLDER = "/var/tmp"
"""Where there is room for what may become as large as the disk; `TMPDIR` says otherwise."""


@contextmanager
def temporary_overlay(image: str, *, fmt: str | None) -> Iterator[str]:
    """The path of a new overlay of `image`, which is there inside the block.

    `fmt` None: found out, and an image that names other files is refused.
    Context: the main thread, in which no loop runs. Raises: ImageError.
    """
    if fmt is None:
        fmt = run_session(lambda opener: opener.probe(image))
    path = local_path(image)
    folder = os.environ.get("TMPDIR") or FOLDER
    try:
        fd, overlay = tempfile.mkstemp(prefix="blockemu-", suffix=".qcow2", dir=folder)
    except OSError as error:
        raise ImageError(folder, f"no temporary overlay: {error.strerror}") from error
    os.close(fd)
    try:
        backing = image if path is None else os.path.abspath(path)
        create_image(
            CreateRequest.from_user(
                overlay, None, fmt="qcow2", backing_file=backing, backing_fmt=fmt
            )
        )
        yield overlay
    finally:
        remove_file(overlay)
