# SPDX-License-Identifier: Apache-2.0
"""Encryption of disks: LUKS volumes, the ciphers that they use, and the secrets that open them.

The primitives (AES, hashes, PBKDF2, random bytes) are those of `cryptography` and of Python's
`hashlib`, both OpenSSL's. What is here is the format around them. Keys and passphrases stand in no
repr, log or message.
"""
