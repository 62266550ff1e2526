# SPDX-License-Identifier: Apache-2.0
"""Builds and runs nbd_harness.c: with nbd_random.c's inputs, or with libFuzzer's.

Both are built with AddressSanitizer and UndefinedBehaviorSanitizer, so that whatever these find
ends the program, and with assertions. As a program (`make fuzz-native`) it runs libFuzzer until it
finds something, and keeps the inputs that reached new code: the next run begins with them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HOUSE = HERE.parents[1]
FOLDER = HOUSE / "build" / "fuzz"

SANITIZERS = "address,undefined"
FLAGS = [
    *("-std=gnu11", "-D_GNU_SOURCE", "-UNDEBUG", "-g", "-O1", "-fno-omit-frame-pointer"),
    *("-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"),
    *(f"-I{HOUSE / folder / 'native'}" for folder in ("loop", "drivers", "blockemu/nbd")),
]
CLANGS = ("clang", *(f"clang-{version}" for version in range(22, 12, -1)))

# What libFuzzer begins with, made by nbd_random.c.
FIRST_SEED, FIRST_INPUTS = 1, 60
# A longer input is slower and says no more. An input takes some milliseconds.
LIMITS = ("-max_len=1024", "-timeout=20", "-rss_limit_mb=2048")


class NotHere(Exception):
    """This machine has no compiler for it; says what is missing."""


def can_build(compiler: str, sanitizers: str) -> bool:
    """Whether a compiler comes with what these sanitizers need."""
    text = "int LLVMFuzzerTestOneInput(const void *b, unsigned long n) { return b && n > 99; }"
    if "fuzzer" not in sanitizers:
        text = "int main(void) { return 0; }"
    command = [compiler, f"-fsanitize={sanitizers}", "-x", "c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=text, text=True, capture_output=True).returncode == 0


def build(names: tuple[str, ...], sanitizers: str, sources: list[str], program: Path) -> Path:
    """Compile with the first compiler that can.

    Raises: NotHere; CalledProcessError when the compiler finds fault with the code.
    """
    for name in names:
        if shutil.which(name) is not None and can_build(name, sanitizers):
            break
    else:
        raise NotHere(f"no compiler with -fsanitize={sanitizers} (tried {', '.join(names)})")
    files = [str(HERE / source) for source in sources]
    command = [name, *FLAGS, f"-fsanitize={sanitizers}", *files, "-laio", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def build_generator(folder: Path) -> Path:
    """The harness with nbd_random.c's inputs. Raises: as build()."""
    sources = ["nbd_harness.c", "nbd_random.c"]
    return build(("gcc", "cc", *CLANGS), SANITIZERS, sources, folder / "nbd_random")


def build_fuzzer(folder: Path) -> Path:
    """The harness with libFuzzer. Raises: as build()."""
    return build(CLANGS, f"fuzzer,{SANITIZERS}", ["nbd_harness.c"], folder / "nbd_fuzz")


def first_inputs(generator: Path, corpus: Path) -> None:
    """Fill an empty corpus."""
    corpus.mkdir()
    words = [generator, "-w", corpus, str(FIRST_SEED), "0", str(FIRST_INPUTS)]
    subprocess.run(words, check=True)


def fuzz_command(fuzzer: Path, corpus: Path, *, seconds: int) -> list[str]:
    """Runs libFuzzer for so long; 0 is for ever. An input that fails lands beside the corpus."""
    time = f"-max_total_time={seconds}"
    return [str(fuzzer), time, *LIMITS, f"-artifact_prefix={corpus.parent}/", str(corpus)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the native NBD connection with libFuzzer.")
    parser.add_argument("--seconds", type=int, default=0, help="how long; 0 (default): for ever")
    parser.add_argument("words", nargs="*", help="more options of libFuzzer, or inputs to run")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        fuzzer = build_fuzzer(FOLDER)
        if not (FOLDER / "corpus").exists():
            first_inputs(build_generator(FOLDER), FOLDER / "corpus")
    except NotHere as error:
        print(f"{error}: on Debian 12, `apt-get install clang-14 libclang-rt-14-dev`")
        return 1
    command = fuzz_command(fuzzer, FOLDER / "corpus", seconds=arguments.seconds)
    if any(not word.startswith("-") for word in arguments.words):
        command = [str(fuzzer)]  # inputs are run alone
    return subprocess.run([*command, *arguments.words]).returncode


if __name__ == "__main__":
    sys.exit(main())
