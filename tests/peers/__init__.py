# SPDX-License-Identifier: Apache-2.0
"""Real programs as context managers and one-line calls.

Everything blockemu claims about NBD and qcow2 is checked against the programs that people use.
Each wrapper here knows how to start its program without guessing (a ready line, an inherited
listening socket, a monitor greeting: never a sleep), how to stop it, and what its answer looks
like. The wrappers hold no opinion on blockemu: the same test can run against ``qemu-nbd`` as a
stand-in, which is how the tests themselves are validated.
"""
