# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests: authorities, servers, clients, and what can be wrong with each.

Folders are laid out as QEMU's and libnbd's credentials want them. Keys are of a curve, since those
are made in no time.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)

SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH


def distinguished_name(common_name: str) -> str:
    """The name of the certificate that `Authority.issue` makes, as authz objects see it."""
    return f"C=GB,O=Example Org,CN={common_name}"


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "GB"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Org"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def put(self, folder: Path, endpoint: str, *, passphrase: bytes | None = None) -> None:
        """As `endpoint`'s own in a folder of credentials."""
        folder.mkdir(exist_ok=True)
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            encryption = serialization.BestAvailableEncryption(passphrase)
        pem = serialization.Encoding.PEM
        (folder / f"{endpoint}-cert.pem").write_bytes(self.certificate.public_bytes(pem))
        key_file = folder / f"{endpoint}-key.pem"
        key_file.touch(mode=0o600)
        key_file.write_bytes(
            self.key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption)
        )


class Authority:
    """Signs certificates."""

    def __init__(self, common_name: str = "test authority", *, expired: bool = False) -> None:
        self._name = _name(common_name)
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            _builder(self._name, key, expired=expired)
            .issuer_name(self._name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
        )
        self.identity = Identity(builder.sign(key, hashes.SHA256()), key)

    def issue(
        self,
        common_name: str = "localhost",
        *,
        purpose: x509.ObjectIdentifier | None = SERVER,
        hosts: Sequence[str] = ("localhost", "127.0.0.1"),
        expired: bool = False,
        is_authority: bool = False,
        subject: x509.Name | None = None,
    ) -> Identity:
        """A certificate for `purpose`, and for `hosts` if it is a server's. `subject`: in the place
        of the usual name."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(subject or _name(common_name), key, expired=expired)
            .issuer_name(self._name)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if purpose is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if purpose == SERVER:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        return Identity(builder.sign(self.identity.key, hashes.SHA256()), key)

    def adopt(self, identity: Identity) -> None:
        """Sign with this one from now on, which another authority has issued."""
        self.identity = identity
        self._name = identity.certificate.subject

    def put(self, folder: Path, *, revoked: Sequence[Identity] = ()) -> None:
        """As who is trusted, with the list of `revoked` ones if there are any."""
        folder.mkdir(exist_ok=True)
        pem = serialization.Encoding.PEM
        (folder / "ca-cert.pem").write_bytes(self.identity.certificate.public_bytes(pem))
        if revoked:
            now = datetime.datetime.now(datetime.UTC)
            builder = (
                x509.CertificateRevocationListBuilder()
                .issuer_name(self._name)
                .last_update(now - DAY)
                .next_update(now + 30 * DAY)
            )
            for identity in revoked:
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(identity.certificate.serial_number)
                    .revocation_date(now - DAY)
                    .build()
                )
            signed = builder.sign(self.identity.key, hashes.SHA256())
            (folder / "ca-crl.pem").write_bytes(signed.public_bytes(pem))


def _builder(
    name: x509.Name, key: ec.EllipticCurvePrivateKey, *, expired: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 10 * DAY)
        .not_valid_after(now - DAY if expired else now + 100 * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def tls_object(folder: Path, endpoint: str, options: str = "") -> str:
    """What QEMU and we take behind --object: the credentials of a folder, with the id `tls0`."""
    return f"tls-creds-x509,id=tls0,dir={folder},endpoint={endpoint}{options}"


@dataclass(frozen=True, slots=True)
class Pki:
    """One authority, and folders of credentials that it vouches for."""

    authority: Authority
    folder: Path
    """A server's and a client's credentials, both good."""

    def folder_of(
        self,
        name: str,
        *,
        server: Identity | None = None,
        client: Identity | None = None,
        authority: Authority | None = None,
        revoked: Sequence[Identity] = (),
    ) -> Path:
        """Another folder beside the good one."""
        folder = self.folder.parent / name
        (authority or self.authority).put(folder, revoked=revoked)
        if server is not None:
            server.put(folder, "server")
        if client is not None:
            client.put(folder, "client")
        return folder


def make_pki(parent: Path) -> Pki:
    """The usual set."""
    authority = Authority()
    folder = parent / "pki"
    authority.put(folder)
    authority.issue().put(folder, "server")
    authority.issue("laptop", purpose=CLIENT).put(folder, "client")
    return Pki(authority, folder)
