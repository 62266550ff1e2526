# SPDX-License-Identifier: Apache-2.0
"""One duty that the document lays on servers, and how it is checked."""

from __future__ import annotations

from dataclasses import dataclass

MUST, MUST_NOT, SHOULD, SHOULD_NOT = "MUST", "MUST NOT", "SHOULD", "SHOULD NOT"


@dataclass(frozen=True)
class Rule:
    """A sentence of the document, in our words.

    `section` is its heading there. `tests` name those that check it, as `file::test` below
    tests/protocol, or as `folder/file::test` below tests. `because` says why there are none, or
    where we do otherwise.
    """

    section: str
    duty: str
    says: str
    tests: tuple[str, ...] = ()
    because: str = ""


def rule(section: str, duty: str, says: str, *tests: str, because: str = "") -> Rule:
    """A Rule, with its tests last."""
    return Rule(section, duty, says, tests, because)
