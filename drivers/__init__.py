# SPDX-License-Identifier: Apache-2.0
"""Floor 2: block nodes and the drivers that they run. It knows nothing of jobs or NBD."""
