# SPDX-License-Identifier: Apache-2.0
"""What a file name means: a path, an NBD URI, or a `json:` object of options.

Wherever an image is named (on a command line, as a backing file in a header) the same rules hold,
QEMU's: `json:{...}` is an option tree, whose keys may be dotted; a name with a colon before its
first slash names a protocol, `nbd:` (URIs) or `file:` (a path); everything else is a path. A path
with such a colon can be written as `./a:b` or `file:a:b`.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.address import is_nbd_uri, parse_uri

JSON_DEPTH_MAX = 16
"""Objects inside each other: more than any graph that makes sense."""

JSON_BYTES_MAX = 64 * 1024

_JSON = "json:"
_FILE = "file:"
_FILE_DRIVERS = ("file", "host_device")

Tree = dict[str, Any]


def is_json(name: str) -> bool:
    """Whether it is a `json:` name, a good one or not."""
    return name.startswith(_JSON)


def has_protocol(name: str) -> bool:
    """Whether it says what kind of name it is; if not, it is a path."""
    return ":" in name.partition("/")[0]


def local_path(name: str) -> str | None:
    """The host path that the name is, as far as it is one without options."""
    if not has_protocol(name):
        return name
    return name.removeprefix(_FILE) if name.startswith(_FILE) else None


def path_to_create(name: str) -> str:
    """The host path at which an image `name` is to be made. Raises: ImageError: it isn't one."""
    path = local_path(name)
    if path is None:
        parse_filename(name, {})
        raise ImageError(name, "an image can't be created there; one that is there can be written")
    return path


def parse_filename(name: str, file_options: Tree) -> Tree:
    """The options of the node that `name` means; `file_options` are those of a host file below.

    Without a `driver` (only `json:` names can lack it) the tree's format is to be found out.
    Raises: ImageError.
    """
    if is_json(name):
        tree = _parse_json(name)
        _default_to_file(tree)
        _add_file_options(tree, file_options)
        return tree
    path = local_path(name)
    if path is not None:
        return {"driver": "file", "filename": path, **copy.deepcopy(file_options)}
    if is_nbd_uri(name):
        return parse_uri(name)
    raise ImageError(name, f"Unknown protocol '{name.partition(':')[0]}'")


def identity(name: str) -> str:
    """The same for names that lead to one image, as far as names can tell.

    The real path of the file at the bottom; for what is no file, the name itself.
    Raises: ImageError, where the name is none.
    """
    path = local_path(name)
    if path is not None:
        return os.path.realpath(path)
    tree = parse_filename(name, {})
    leaf = tree
    while isinstance(leaf.get("file"), dict):
        leaf = leaf["file"]
    filename = leaf.get("filename")
    if isinstance(filename, str) and leaf.get("driver", "file") in _FILE_DRIVERS:
        return os.path.realpath(filename)
    return json.dumps(leaf, sort_keys=True)


def resolve(name: str, *, above: str, what: str = "backing file") -> str:
    """The name, from here, of the file that the image `above` calls `name`.

    A path is relative to the folder of the image that says it. Names of other kinds, and file names
    inside a `json:` one, are the same from everywhere. `what` it is the name of, for messages.
    Raises: ImageError.
    """
    if has_protocol(name):
        if not is_json(name) and not is_nbd_uri(name) and local_path(name) is None:
            raise ImageError(above, f"{what} '{name}': Unknown protocol '{_protocol(name)}'")
        return name
    if os.path.isabs(name):
        return name
    folder = local_path(above)
    if folder is None:
        raise ImageError(above, f"{what} '{name}' is relative to what has no folder")
    return os.path.join(os.path.dirname(folder), name)


def _protocol(name: str) -> str:
    return name.partition(":")[0]


def parse_image_opts(text: str) -> Tree:
    """The option tree of `--image-opts`: `driver=qcow2,file.filename=x`; a comma is written twice.

    Raises: ImageError.
    """
    flat: Tree = {}
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.replace("\0", ",").partition("=")
        if not equals or not key:
            raise ImageError(text, f"'{part}' isn't KEY=VALUE")
        flat[key] = value
    tree = _unflattened(text, flat, depth=0)
    _default_to_file(tree)
    return tree


def name_of_image_opts(text: str) -> str:
    """The `json:` name that means the same as `--image-opts TEXT`. Raises: ImageError."""
    return _JSON + json.dumps(parse_image_opts(text))


def _parse_json(name: str) -> Tree:
    text = name.removeprefix(_JSON)
    if len(text) > JSON_BYTES_MAX:
        raise ImageError(name[:80] + "...", f"has more than {JSON_BYTES_MAX} characters")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(name, f"Could not parse the JSON options: {error}") from None
    if not isinstance(found, dict):
        raise ImageError(name, "Invalid JSON object given")
    return _unflattened(name, found, depth=0)


def _unflattened(name: str, flat: Tree, *, depth: int) -> Tree:
    """`a.b` is the entry `b` of the object `a`, all the way down."""
    if depth > JSON_DEPTH_MAX:
        raise ImageError(name, f"has more than {JSON_DEPTH_MAX} objects inside each other")
    nested: Tree = {}
    for key, value in flat.items():
        head, dot, rest = key.partition(".")
        if dot:
            inner = nested.setdefault(head, {})
            if not isinstance(inner, dict) or rest in inner:
                raise ImageError(name, f"says '{head}' twice, or as two things")
            inner[rest] = value
        elif isinstance(value, dict) and isinstance(nested.get(head), dict):
            if value.keys() & nested[head].keys():
                raise ImageError(name, f"says '{head}' twice, or as two things")
            nested[head] |= value
        elif head in nested:
            raise ImageError(name, f"says '{head}' twice, or as two things")
        else:
            nested[head] = dict(value) if isinstance(value, dict) else value
    return {
        key: _unflattened(name, value, depth=depth + 1) if isinstance(value, dict) else value
        for key, value in nested.items()
    }


def _default_to_file(tree: Tree) -> None:
    """A `file` that has a name and no driver is a host file."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if key == "file" and "filename" in value:
                value.setdefault("driver", "file")
            _default_to_file(value)


def _add_file_options(tree: Tree, file_options: Tree) -> None:
    """Where the tree's file node says nothing of its own, it gets what other names would get."""
    while isinstance(tree.get("file"), dict):
        tree = tree["file"]
    if tree.get("driver") in _FILE_DRIVERS:
        for key, value in copy.deepcopy(file_options).items():
            tree.setdefault(key, value)
