# SPDX-License-Identifier: Apache-2.0
"""What each request type promises. Section "Request types"; BLOCK_STATUS is in test_metadata.py."""

from __future__ import annotations

import pytest

from tests.protocol.client import Client
from tests.protocol.conftest import CONTENT, DISK_BYTES, SCRATCH
from tests.protocol.wire import Cmd, CmdFlag, Err, Flag

AT = SCRATCH + (1 << 20)


def test_no_length_never_disconnects(disk: Client) -> None:
    for command in (Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE):
        for offset in (0, AT, DISK_BYTES):
            disk.call(command, offset, 0)
            assert disk.alive()


# --- NBD_CMD_READ ---


def test_read_answers_with_all_of_the_range(disk: Client) -> None:
    for offset, length in ((0, 1), (0, 512), (1, 4095), (100, 70_000), (0, 256 << 10)):
        assert disk.read(offset, length) == CONTENT[offset : offset + length]


def test_read_of_the_last_byte_works(disk: Client) -> None:
    assert len(disk.read(DISK_BYTES - 1, 1)) == 1


# --- NBD_CMD_WRITE ---


@pytest.mark.parametrize("flags", [0, CmdFlag.FUA])
def test_write_is_there_when_it_is_answered(disk: Client, flags: int) -> None:
    for length in (1, 512, 4096, 70_001, 1 << 20):
        data = (length.to_bytes(4, "big") * length)[:length]
        assert not disk.call(Cmd.WRITE, AT, flags=flags, payload=data).error
        assert disk.read(AT, length) == data


def test_write_that_fails_says_so_and_writes_nothing(disk: Client) -> None:
    last = DISK_BYTES - 512
    assert not disk.call(Cmd.WRITE, last, payload=b"a" * 512).error
    assert disk.call(Cmd.WRITE, last, payload=b"b" * 1024).error == Err.ENOSPC
    assert disk.read(last, 512) == b"a" * 512


# --- NBD_CMD_FLUSH ---


def test_flush_is_answered(disk: Client) -> None:
    assert not disk.call(Cmd.FLUSH).error


# --- NBD_CMD_TRIM ---


def test_trim_leaves_the_neighbourhood_alone(disk: Client) -> None:
    assert disk.flags & Flag.SEND_TRIM
    assert not disk.call(Cmd.WRITE, AT, payload=b"t" * (192 << 10)).error
    assert not disk.call(Cmd.TRIM, AT + (64 << 10) + 1, (64 << 10) - 2).error
    assert disk.read(AT, (64 << 10) + 1) == b"t" * ((64 << 10) + 1)
    assert disk.read(AT + (128 << 10) - 1, 64 << 10) == b"t" * (64 << 10)


# --- NBD_CMD_CACHE ---


def test_cache_changes_nothing_that_is_read(disk: Client) -> None:
    disk.call(Cmd.CACHE, 0, 64 << 10)
    assert disk.read(0, 64 << 10) == CONTENT[: 64 << 10]


def test_cache_fails_with_an_error_value(disk: Client) -> None:
    assert disk.call(Cmd.CACHE, DISK_BYTES, 512).error == Err.EINVAL
    assert disk.alive()


# --- NBD_CMD_WRITE_ZEROES ---


@pytest.mark.parametrize("flags", [0, CmdFlag.NO_HOLE, CmdFlag.FUA])
def test_write_zeroes_reads_back_as_zeroes(disk: Client, flags: int) -> None:
    for skip, length in ((0, 64 << 10), (1, 511), (777, 100_000)):
        assert not disk.call(Cmd.WRITE, AT, payload=b"z" * (skip + length + 1)).error
        assert not disk.call(Cmd.WRITE_ZEROES, AT + skip, length, flags=flags).error
        assert disk.read(AT, skip + length + 1) == b"z" * skip + bytes(length) + b"z"


def test_fast_zero_is_quick_and_right_or_changes_nothing(disk: Client) -> None:
    """Where it isn't advertised it is invalid; where it is, it works or isn't supported."""
    outcomes = {Err.OK, Err.ENOTSUP} if disk.flags & Flag.SEND_FAST_ZERO else {Err.EINVAL}
    for length in (4096, 777, 40 << 20):
        assert not disk.call(Cmd.WRITE, AT, payload=b"f" * 777).error
        error = disk.call(Cmd.WRITE_ZEROES, AT, length, flags=CmdFlag.FAST_ZERO).error
        assert error in outcomes
        assert disk.read(AT, 777) == (b"f" * 777 if error else bytes(777))
