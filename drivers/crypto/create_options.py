# SPDX-License-Identifier: Apache-2.0
"""What a new LUKS volume is to be: QEMU's creation options, checked together.

`key-secret`, `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`, `iter-time`
(milliseconds); for a qcow2 image each stands behind `encrypt.`.
"""

from __future__ import annotations

from typing import Any

from blockemu.drivers.crypto.cipher_spec import CipherSpec, check_hash
from blockemu.drivers.crypto.luks_volume import ITER_TIME_MS, ITER_TIME_MS_MAX, NewVolume
from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_size, take_str


def take_new_volume(name: str, options: dict[str, Any], *, prefix: str = "") -> NewVolume:
    """Take these options, but for `key-secret`, out of `options`. Raises: ImageError."""
    iv_generator = take_str(name, options, f"{prefix}ivgen-alg", "plain64")
    iv_hash = take_str(name, options, f"{prefix}ivgen-hash-alg", None)
    spec = CipherSpec.from_options(
        name,
        take_str(name, options, f"{prefix}cipher-alg", "aes-256"),
        take_str(name, options, f"{prefix}cipher-mode", "xts"),
        iv_generator,
        iv_hash or ("sha256" if iv_generator == "essiv" else None),
    )
    hash_name = take_str(name, options, f"{prefix}hash-alg", "sha256")
    check_hash(name, hash_name)
    return NewVolume(spec, hash_name, take_iter_time(name, options, prefix=prefix))


def take_iter_time(name: str, options: dict[str, Any], *, prefix: str = "") -> int:
    """`iter-time`, in milliseconds. Raises: ImageError."""
    key = f"{prefix}iter-time"
    iter_time_ms = take_size(name, options, key, ITER_TIME_MS)
    if not 1 <= iter_time_ms <= ITER_TIME_MS_MAX:
        raise ImageError(name, f"option '{key}' is between 1 and {ITER_TIME_MS_MAX} milliseconds")
    assert isinstance(iter_time_ms, int)
    return iter_time_ms
