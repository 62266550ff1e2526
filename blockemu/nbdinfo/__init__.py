# SPDX-License-Identifier: Apache-2.0
"""What `blockemu nbd info` and `list` do: tell what NBD servers offer, in nbdinfo's words."""

from __future__ import annotations
