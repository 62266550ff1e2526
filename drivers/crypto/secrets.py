# SPDX-License-Identifier: Apache-2.0
"""Secrets by name: passphrases that images are unlocked with (QEMU's objects of type `secret`).

Context: the main context's home thread. What a secret is stays out of every repr and message.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any, Final

from blockemu.drivers.errors import ImageError

SECRET_BYTES_MAX: Final = 64 * 1024
"""A passphrase is short; a disk handed in by mistake is not."""

_FORMATS: Final = ("raw", "base64")

ReadFile = Callable[[str, int], bytes]
"""`(path, bytes at most)` -> the file's first bytes. Raises: OSError."""


class SecretTable:
    """The secrets of one program, by their ids."""

    def __init__(self) -> None:
        self._secrets: dict[str, bytes] = {}

    def __contains__(self, secret_id: str) -> bool:
        return secret_id in self._secrets

    def add(self, secret_id: str, value: bytes) -> None:
        """Raises: ImageError, if there is one of this name."""
        if not secret_id:
            raise ImageError("secret", "it needs an id")
        if secret_id in self._secrets:
            raise ImageError(secret_id, "an object of this name exists already")
        self._secrets[secret_id] = value

    def remove(self, secret_id: str) -> None:
        """Images that were unlocked with it stay so. Raises: ImageError."""
        if self._secrets.pop(secret_id, None) is None:
            raise ImageError(secret_id, "there is no object of this name")

    def find(self, name: str, secret_id: str) -> bytes:
        """For the image `name`. Raises: ImageError."""
        found = self._secrets.get(secret_id)
        if found is None:
            raise ImageError(name, f"there is no secret '{secret_id}'")
        return found


def read_secret(secret_id: str, options: Mapping[str, Any], read_file: ReadFile) -> bytes:
    """What a secret object's options say: `file` or `data`, and `format` (raw, base64).

    Raises: ImageError, which never shows the secret.
    """
    name = f"secret '{secret_id}'"
    rest = dict(options)
    data, path = rest.pop("data", None), rest.pop("file", None)
    encoding = rest.pop("format", "raw")
    if rest.keys() & {"keyid", "iv"}:
        raise ImageError(name, "encrypted secrets (keyid, iv) are not supported")
    if rest:
        raise ImageError(name, f"there is no option '{next(iter(rest))}'")
    if encoding not in _FORMATS:
        raise ImageError(name, "format is raw or base64")
    if (data is None) == (path is None):
        raise ImageError(name, "takes one of 'file' and 'data'")
    if not isinstance(data if path is None else path, str):
        raise ImageError(name, "'file' and 'data' are texts")
    if path is not None:
        value = _read(name, path, read_file)
    else:
        value = data.encode("utf-8", "surrogateescape")
    if encoding == "base64":
        try:
            value = base64.b64decode(value.strip(), validate=True)
        except (binascii.Error, ValueError):
            raise ImageError(name, "its value is not base64") from None
    return value


def _read(name: str, path: str, read_file: ReadFile) -> bytes:
    try:
        value = read_file(path, SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise ImageError.from_os_error(path, error) from error
    if len(value) > SECRET_BYTES_MAX:
        raise ImageError(name, f"{path} is over {SECRET_BYTES_MAX} bytes, too long for a secret")
    return value
