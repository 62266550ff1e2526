# SPDX-License-Identifier: Apache-2.0
"""A short file read at once: keys, certificates, lists. Images have host_file.py."""

from __future__ import annotations


def read_small_file(path: str, bytes_max: int) -> bytes:
    """The first bytes of a file; a pipe (`/dev/fd/3`) will do.

    Context: any thread, but it waits for the file: not the loop's, once that runs. Raises: OSError.
    """
    with open(path, "rb") as file:
        return file.read(bytes_max)
