# SPDX-License-Identifier: Apache-2.0
"""`python -m blockemu` is the `blockemu` command."""

from __future__ import annotations

from blockemu.cli import main

if __name__ == "__main__":
    main()
