# SPDX-License-Identifier: Apache-2.0
"""Who may come in, by name: QEMU's objects `authz-simple`, `authz-list` and `authz-list-file`.

A name is here the distinguished name in a client's certificate, `O=Example,CN=laptop`. Rules are
tried in their order; the first that matches decides, and where none does, the list's policy.
A file is read again when it has changed.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_bool, take_choice, take_str

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockemu.drivers.crypto.secrets import ReadFile

log = logging.getLogger(__name__)

LIST_BYTES_MAX: Final = 1024 * 1024
RULES_MAX: Final = 10_000

_POLICIES: Final = ("deny", "allow")
_FORMATS: Final = ("exact", "glob")
_RULE_OPTION: Final = re.compile(r"rules\.(\d{1,5})\.(match|policy|format)")


class Authorizer(Protocol):
    """Context: any thread."""

    def allows(self, identity: str) -> bool:
        """Whether whoever is called that may come in."""


@dataclass(frozen=True, slots=True)
class SimpleAuthorizer:
    """One name."""

    identity: str

    def allows(self, identity: str) -> bool:
        return identity == self.identity


@dataclass(frozen=True, slots=True)
class Rule:
    """Whom it is about, and what it says."""

    match: str
    allow: bool
    glob: bool

    def matches(self, identity: str) -> bool:
        if self.glob:
            return fnmatch.fnmatchcase(identity, self.match)
        return identity == self.match


@dataclass(frozen=True, slots=True)
class ListAuthorizer:
    """Rules, and what holds where none matches."""

    rules: Sequence[Rule]
    allow: bool

    def allows(self, identity: str) -> bool:
        for rule in self.rules:
            if rule.matches(identity):
                return rule.allow
        return self.allow


class FileAuthorizer:
    """The list in a file of JSON: `{"policy": "deny", "rules": [{"match": ..., "policy": ...}]}`.

    `refresh`: a file that has changed is read again at the next question; while it can't be read,
    nobody comes in.
    """

    def __init__(self, name: str, path: str, *, refresh: bool, read_file: ReadFile) -> None:
        """Raises: ImageError."""
        self._name = name
        self._path = path
        self._refresh = refresh
        self._read_file = read_file
        self._seen = self._stamp()
        self._list = self._read()

    def allows(self, identity: str) -> bool:
        if self._refresh and (stamp := self._stamp()) != self._seen:
            self._seen = stamp
            try:
                self._list = self._read()
            except ImageError as error:
                log.warning("%s; nobody is let in", error)
                self._list = ListAuthorizer((), allow=False)
        return self._list.allows(identity)

    def _stamp(self) -> tuple[int, ...] | None:
        """What tells a changed file from the one that was read."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> ListAuthorizer:
        try:
            data = self._read_file(self._path, LIST_BYTES_MAX + 1)
        except OSError as error:
            raise ImageError.from_os_error(self._path, error) from error
        if len(data) > LIST_BYTES_MAX:
            raise ImageError(self._path, f"is over {LIST_BYTES_MAX} bytes")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            raise ImageError(self._path, "isn't JSON") from None
        if not isinstance(found, dict):
            raise ImageError(self._path, "isn't an object of 'policy' and 'rules'")
        return _read_list(self._path, found)


def read_authorizer(
    kind: str, object_id: str, options: dict[str, Any], *, read_file: ReadFile
) -> Authorizer:
    """What an authz object's options say. Raises: ImageError."""
    name = f"{kind} '{object_id}'"
    rest = dict(options)
    made: Authorizer
    if kind == "authz-simple":
        made = SimpleAuthorizer(take_str(name, rest, "identity"))
    elif kind == "authz-list-file":
        path = take_str(name, rest, "filename")
        refresh = take_bool(name, rest, "refresh", default=True)
        made = FileAuthorizer(name, path, refresh=refresh, read_file=read_file)
    else:
        rest = _nested(name, rest)
        made = _read_list(name, rest)
        rest = {}
    if rest:
        raise ImageError(name, f"there is no option '{next(iter(rest))}'")
    return made


def _nested(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """`rules.0.match=...` of a command line as the list that QMP has."""
    nested: dict[str, Any] = {}
    rules: dict[int, dict[str, Any]] = {}
    for key, value in options.items():
        if found := _RULE_OPTION.fullmatch(key):
            rules.setdefault(int(found[1]), {})[found[2]] = value
        else:
            nested[key] = value
    if rules:
        if sorted(rules) != list(range(len(rules))):
            raise ImageError(name, "its rules aren't numbered from 0 on without a gap")
        nested["rules"] = [rules[index] for index in range(len(rules))]
    return nested


def _read_list(name: str, options: dict[str, Any]) -> ListAuthorizer:
    rest = dict(options)
    policy = take_choice(name, rest, "policy", _POLICIES, "deny")
    rules = rest.pop("rules", [])
    if rest:
        raise ImageError(name, f"there is no option '{next(iter(rest))}'")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ImageError(name, "'rules' is a list of objects")
    if len(rules) > RULES_MAX:
        raise ImageError(name, f"has {len(rules)} rules, and at most {RULES_MAX}")
    return ListAuthorizer(
        tuple(_read_rule(f"{name}: rule {index}", rule) for index, rule in enumerate(rules)),
        allow=policy == "allow",
    )


def _read_rule(name: str, options: dict[str, Any]) -> Rule:
    rest = dict(options)
    match = take_str(name, rest, "match")
    policy = take_choice(name, rest, "policy", _POLICIES, "deny")
    kind = take_choice(name, rest, "format", _FORMATS, "exact")
    if rest:
        raise ImageError(name, f"there is no option '{next(iter(rest))}'")
    return Rule(match, policy == "allow", kind == "glob")
