# SPDX-License-Identifier: Apache-2.0
"""Random bytes that nobody can guess: for keys and salts.

A seam, as the clock is: who needs them is handed the function, so a simulation or a test may give
another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

Entropy = Callable[[int], bytes]
"""As many random bytes as asked for. Context: any thread."""

system_entropy: Final[Entropy] = os.urandom
"""The kernel's."""
