# SPDX-License-Identifier: Apache-2.0
"""``make bench``: blockemu beside its alternatives, in one interleaved run."""
