# SPDX-License-Identifier: Apache-2.0
"""The two kinds of failure of the block layer.

Opening, creating and configuring fail with `ImageError`: a name and a reason, one line, meant for
a person. A request on an open node fails with `OSError` and an errno, because that is what travels
on to a client: EIO, ENOSPC, EINVAL, EPERM, ENOTSUP, EFBIG.
"""

from __future__ import annotations

import errno
import os


class ImageError(Exception):
    """An image, node or option that can't be used: `str()` is the one line to show."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    @classmethod
    def from_os_error(cls, name: str, error: OSError) -> ImageError:
        """The same failure in the words of the host: `name: No such file or directory`."""
        return cls(name, error.strerror or os.strerror(error.errno or errno.EIO))


def io_error(code: int, detail: str) -> OSError:
    """An `OSError` with errno `code` whose text says what was refused, for the log."""
    return OSError(code, f"{os.strerror(code)} ({detail})")
