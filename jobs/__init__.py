# SPDX-License-Identifier: Apache-2.0
"""Floor 3: the job state machine, and the jobs. It knows nothing of NBD or QMP."""
