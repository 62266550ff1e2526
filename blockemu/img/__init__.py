# SPDX-License-Identifier: Apache-2.0
"""What `blockemu img` does: qemu-img's subcommands as functions. The command line is in cli/."""
