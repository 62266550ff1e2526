# SPDX-License-Identifier: Apache-2.0
"""How many files this process may have open.

The soft limit is 1024 on most systems, for the sake of programs that call select(2); we don't. Our
own bounds (limits.py's `connections_max`, config.py's `IMAGES_MAX`) want several times that. The
hard limit is the administrator's, and stays.
"""

from __future__ import annotations

import resource


def raise_open_files_limit() -> None:
    """Raise the soft limit to the hard one, as far as we are let."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # then fewer clients are accepted at once
