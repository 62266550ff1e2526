# SPDX-License-Identifier: Apache-2.0
"""L2 tables in runs, against a walk entry by entry."""

from __future__ import annotations

import random
from array import array

import pytest

from blockemu.drivers.qcow2.entry_runs import BLOCK_ENTRIES, Run, runs_of
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO


def entry_by_entry(words: list[int], cluster_size: int) -> list[Run]:
    found: list[Run] = []
    for index, word in enumerate(words):
        if word & (COMPRESSED | L2_RESERVED | (OFFSET_MASK & (cluster_size - 1))):
            found.append(Run(index, 0, word))
        elif word & OFFSET_MASK:
            last = found[-1] if found else Run(0, 0, 0)
            follows = last.at + last.entries == index
            if last.entries and follows and word == last.value + last.entries * cluster_size:
                found[-1] = Run(last.at, last.entries + 1, last.value)
            else:
                found.append(Run(index, 1, word))
    return found


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_runs_are_those_of_a_walk_entry_by_entry(cluster_size: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        words: list[int] = []
        while len(words) < cluster_size // 8:
            length = rng.choice((1, 2, 3, BLOCK_ENTRIES, 200))
            first = rng.choice((0, rng.randrange(1, 1 << 20) * cluster_size, rng.getrandbits(64)))
            first |= rng.choice((0, COPIED, COPIED, ZERO)) if first else 0
            step = rng.choice((cluster_size, cluster_size, 0)) if first else 0
            words += [(first + index * step) % (1 << 64) for index in range(length)]
        del words[cluster_size // 8 :]
        assert runs_of(array("Q", words), cluster_size) == entry_by_entry(words, cluster_size)


def test_run_over_the_whole_table_is_one() -> None:
    words = array("Q", range(COPIED | 65536, COPIED | 65536 * 8193, 65536))
    assert runs_of(words, 65536) == [Run(0, 8192, COPIED | 65536)]
