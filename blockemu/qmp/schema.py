# SPDX-License-Identifier: Apache-2.0
"""A command's arguments as a dataclass: the annotations are the schema.

Field `node_name` is the member `node-name`; where the protocol has an underscore (`detect_zeroes`),
the field says so: `field(metadata={"key": "detect_zeroes"})`. A field with a default may be left
out. Types that are understood: str, bool, int, float, an Enum (by value), list[T], dict[str, Any],
Any, a nested dataclass, and `T | None` for one that is optional and has no other default. (A null
on the wire is refused, as it is by QEMU, unless the field says `Any`.)
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar

from blockemu.qmp.errors import QmpError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class NoArguments:
    """For commands that take none."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    field: str
    key: str
    annotation: Any
    optional: bool


def member_key(field: dataclasses.Field[Any]) -> str:
    """The name on the wire of a dataclass's field."""
    return str(field.metadata.get("key", field.name.replace("_", "-")))


@cache
def _members(cls: Hashable) -> dict[str, _Member]:
    assert isinstance(cls, type)
    assert dataclasses.is_dataclass(cls), cls
    annotations = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        key = member_key(field)
        found[key] = _Member(field.name, key, annotations[field.name], optional)
    return found


def parse_arguments(cls: type[T], members: dict[str, Any], *, path: str = "") -> T:
    """An instance of the dataclass `cls` made of JSON `members`. Raises: QmpError."""
    known = _members(typing.cast(Hashable, cls))
    values: dict[str, Any] = {}
    for key, member in known.items():
        if key in members:
            values[member.field] = _convert(member.annotation, members[key], path + key)
        elif not member.optional:
            raise QmpError(f"Parameter '{path}{key}' is missing")
    for key in members:
        if key not in known:
            raise QmpError(f"Parameter '{path}{key}' is unexpected")
    return cls(**values)


def _convert(annotation: Any, value: Any, path: str) -> Any:
    """`value` as what `annotation` asks for, or the refusal that names it."""
    if annotation is Any:
        return value
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        choices = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        assert len(choices) == 1, annotation
        return _convert(choices[0], value, path)
    if origin is list:
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        (item,) = typing.get_args(annotation)
        return [_convert(item, element, f"{path}[{i}]") for i, element in enumerate(value)]
    if origin is dict or dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        if origin is dict:
            return value
        assert isinstance(annotation, type)
        return parse_arguments(annotation, value, path=path + ".")
    return _convert_scalar(annotation, value, path)


def _convert_scalar(annotation: Any, value: Any, path: str) -> Any:
    if issubclass(annotation, enum.Enum):
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        try:
            return annotation(value)
        except ValueError as error:
            raise QmpError(f"Parameter '{path}' does not accept value '{value}'") from error
    if annotation is bool and not isinstance(value, bool):
        raise _wrong_type(path, "boolean")
    if annotation is str and not isinstance(value, str):
        raise _wrong_type(path, "string")
    if annotation is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise _wrong_type(path, "integer")
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(path, "number")
        return float(value)
    assert annotation in (bool, str, int), annotation
    return value


def _wrong_type(path: str, expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{path}', expected: {expected}")
