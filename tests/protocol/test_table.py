# SPDX-License-Identifier: Apache-2.0
"""The table of duties and the tests agree: no duty without a test or a reason, no test without a
duty, no name of a test that isn't there."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from pathlib import Path

from tests.protocol import (
    rules_chunks,
    rules_handshake,
    rules_metadata,
    rules_tls,
    rules_transmission,
)
from tests.protocol.rule import Rule

HERE = Path(__file__).parent
TESTS = HERE.parent
RULES: tuple[Rule, ...] = (
    *rules_handshake.RULES,
    *rules_transmission.RULES,
    *rules_chunks.RULES,
    *rules_metadata.RULES,
    *rules_tls.RULES,
)
NOT_OF_THE_DOCUMENT = {"test_table"}


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """The names of a file's test functions."""
    tree = ast.parse(path.read_text())
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def place(name: str) -> tuple[Path, str]:
    """The file and the function that a rule's `file::test` means."""
    file, _, test = name.partition("::")
    folder = TESTS if "/" in file else HERE
    return folder / f"{file}.py", test


def test_every_duty_has_tests_that_exist_or_a_reason() -> None:
    for one in RULES:
        assert bool(one.tests) != bool(one.because), one
        for name in one.tests:
            path, test = place(name)
            assert path.is_file(), f"{name}: no such file"
            assert test in names_in(path), f"{name}: no such test"


def test_every_test_of_the_document_is_some_dutys() -> None:
    named = {name for one in RULES for name in one.tests}
    here = {
        f"{path.stem}::{test}"
        for path in HERE.glob("test_*.py")
        if path.stem not in NOT_OF_THE_DOCUMENT
        for test in names_in(path)
    }
    assert not here - named, "say in a rules_*.py which duty they check"


def test_no_duty_is_told_twice() -> None:
    told = Counter((one.section, one.duty, one.says) for one in RULES)
    assert [key for key, count in told.items() if count > 1] == []
