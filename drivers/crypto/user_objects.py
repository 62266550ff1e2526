# SPDX-License-Identifier: Apache-2.0
"""The objects that a user made by id: secrets, TLS credentials, lists of who may come in.

An id stands for one object, of whatever type. Who made use of an object keeps what it took: a later
removal changes nothing for connections, nodes and servers that exist.

Context: the main context's home thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.crypto.secrets import SecretTable
from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from blockemu.drivers.crypto.authorization import Authorizer
    from blockemu.drivers.crypto.tls_credentials import TlsCredentials


class UserObjects:
    """Of one program."""

    def __init__(self, secrets: SecretTable | None = None) -> None:
        self.secrets = secrets or SecretTable()
        self._credentials: dict[str, TlsCredentials] = {}
        self._authorizers: dict[str, Authorizer] = {}

    def add_secret(self, object_id: str, value: bytes) -> None:
        """Raises: ImageError, if there is an object of this name."""
        self._check_free(object_id)
        self.secrets.add(object_id, value)

    def add_credentials(self, object_id: str, credentials: TlsCredentials) -> None:
        """Raises: ImageError, if there is an object of this name."""
        self._check_free(object_id)
        self._credentials[object_id] = credentials

    def add_authorizer(self, object_id: str, authorizer: Authorizer) -> None:
        """Raises: ImageError, if there is an object of this name."""
        self._check_free(object_id)
        self._authorizers[object_id] = authorizer

    def remove(self, object_id: str) -> None:
        """Raises: ImageError, if there is none."""
        if object_id in self._credentials:
            del self._credentials[object_id]
        elif object_id in self._authorizers:
            del self._authorizers[object_id]
        else:
            self.secrets.remove(object_id)

    def credentials(self, name: str, object_id: str, *, endpoint: str) -> TlsCredentials:
        """For whoever is called `name`, as a server or as a client. Raises: ImageError."""
        found = self._credentials.get(object_id)
        if found is None:
            raise ImageError(name, f"there are no TLS credentials '{object_id}'")
        if found.endpoint != endpoint:
            raise ImageError(
                name,
                f"TLS credentials '{object_id}' are for a {found.endpoint}: "
                f"a {endpoint}'s have endpoint={endpoint}",
            )
        return found

    def authorizer(self, name: str, object_id: str) -> Authorizer:
        """For whoever is called `name`. Raises: ImageError."""
        found = self._authorizers.get(object_id)
        if found is None:
            raise ImageError(name, f"there is no authz object '{object_id}'")
        return found

    def _check_free(self, object_id: str) -> None:
        taken = (self.secrets, self._credentials, self._authorizers)
        if any(object_id in table for table in taken):
            raise ImageError(object_id, "an object of this name exists already")
