# SPDX-License-Identifier: Apache-2.0
"""The native NBD connection, its poll and its map against random clients, under sanitizers.

nbd_harness.c says what is compared with what. Its inputs come from a seeded generator, and, where
there is clang, from libFuzzer, which looks for those that reach new code. `BLOCKEMU_SEED` replays a
run of the generator, `BLOCKEMU_ROUNDS` has both run so many times as long; `make fuzz-native` goes
on with libFuzzer and keeps what it has found. The smaller harnesses, of a C file each, are run
under sanitizers by the tests of those files.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.native.fuzzer import (
    FIRST_INPUTS,
    NotHere,
    build_fuzzer,
    build_generator,
    first_inputs,
    fuzz_command,
)
from tests.peers.requirement import give_up

pytestmark = pytest.mark.skipif(
    os.environ.get("BLOCKEMU_NATIVE") == "0", reason="is about the C data path"
)

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
RANDOM_S = 12 * ROUNDS
FUZZER_S = 15 * ROUNDS
# The compilers take some 20 s on a slow machine.
SLACK_S = 90
NO_END = 1 << 40


def run(words: Sequence[object], *, timeout_s: float) -> str:
    """What a program says. Fails with it when it ends badly."""
    result = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
    )
    assert result.returncode == 0, result.stdout[-12000:]
    return result.stdout


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness with nbd_random.c's inputs."""
    try:
        return build_generator(tmp_path_factory.mktemp("fuzz"))
    except NotHere as error:
        give_up(str(error))


@pytest.mark.slow
@pytest.mark.timeout(RANDOM_S + 2 * SLACK_S)
def test_random_clients_get_what_the_model_says(generator: Path, seed: int) -> None:
    chosen = int(os.environ.get("BLOCKEMU_SEED", seed))
    print(f"seed {chosen}: replay with BLOCKEMU_SEED={chosen}")
    said = run([generator, chosen, 0, NO_END, RANDOM_S], timeout_s=RANDOM_S + SLACK_S)
    print(said)
    assert int(said.split()[0]) > 100


@pytest.mark.slow
@pytest.mark.timeout(FUZZER_S + 2 * SLACK_S)
def test_inputs_that_reach_new_code_get_what_the_model_says(
    generator: Path, tmp_path: Path
) -> None:
    try:
        fuzzer = build_fuzzer(tmp_path)
    except NotHere as error:
        pytest.skip(f"{error}: `apt-get install clang-14 libclang-rt-14-dev`")
    corpus = tmp_path / "corpus"
    first_inputs(generator, corpus)
    said = run(fuzz_command(fuzzer, corpus, seconds=FUZZER_S), timeout_s=FUZZER_S + SLACK_S)
    print(said[-2000:])
    assert len(list(corpus.iterdir())) > FIRST_INPUTS
