# SPDX-License-Identifier: Apache-2.0
"""The process's limit of open files."""

from __future__ import annotations

import resource

from blockemu.cli.open_files import raise_open_files_limit


def test_the_soft_limit_becomes_the_hard_one() -> None:
    """250 images with O_DIRECT have 1013 files open: at the usual limit of 1024, 11 clients came
    in, and the others waited while the log filled with "Too many open files"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
