# SPDX-License-Identifier: Apache-2.0
"""Certificates looked at before they are used: what would fail in each client's face fails here.

OpenSSL checks a certificate when a peer presents it. That ours has expired, is for clients only, or
was signed by somebody else is then the peer's finding, and its log's. So credentials are checked
when they are made (QEMU's `sanity-check`), and the line names the file.

Source: RFC 5280, section 4.2 (basic constraints, key usage, extended key usage).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_E = TypeVar("_E", bound=x509.ExtensionType)

CHAIN_LENGTH_MAX: Final = 10
"""Certificates from one's own to the authority's. OpenSSL would go to 100."""

_PURPOSES: Final = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}


_ATTRIBUTE_NAMES: Final = {
    NameOID.BUSINESS_CATEGORY: "businessCategory",
    NameOID.DN_QUALIFIER: "dnQualifier",
    NameOID.EMAIL_ADDRESS: "EMAIL",
    NameOID.GENERATION_QUALIFIER: "generationQualifier",
    NameOID.GIVEN_NAME: "givenName",
    NameOID.INITIALS: "initials",
    NameOID.JURISDICTION_COUNTRY_NAME: "jurisdictionOfIncorporationCountryName",
    NameOID.JURISDICTION_LOCALITY_NAME: "jurisdictionOfIncorporationLocalityName",
    NameOID.JURISDICTION_STATE_OR_PROVINCE_NAME: "jurisdictionOfIncorporationStateOrProvinceName",
    NameOID.POSTAL_CODE: "postalCode",
    NameOID.PSEUDONYM: "pseudonym",
    NameOID.SERIAL_NUMBER: "serialNumber",
    NameOID.STREET_ADDRESS: "street",
    NameOID.SURNAME: "surName",
    NameOID.TITLE: "title",
}
"""GnuTLS's, where they aren't RFC 4514's; asked of qemu-nbd's log."""


def read_certificates(path: str, data: bytes) -> list[x509.Certificate]:
    """Those in a PEM file, one at least. Raises: ImageError."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise ImageError(path, "holds no certificate in PEM form") from None


def read_revocation_list(path: str, data: bytes) -> x509.CertificateRevocationList:
    """The one in a PEM file. Raises: ImageError."""
    try:
        return x509.load_pem_x509_crl(data)
    except ValueError:
        raise ImageError(path, "holds no list of revoked certificates in PEM form") from None


def check_authority(path: str, certificates: Sequence[x509.Certificate], now_s: float) -> None:
    """Whether each may vouch for others now. Raises: ImageError."""
    for certificate in certificates:
        _check_dates(path, certificate, now_s)
        constraints = _extension(certificate, x509.BasicConstraints)
        if constraints is None or not constraints.ca:
            raise ImageError(path, "is no certificate of an authority (CA:TRUE is missing)")
        usage = _extension(certificate, x509.KeyUsage)
        if usage is not None and not usage.key_cert_sign:
            raise ImageError(path, "may not sign certificates, by its key usage")


def check_own(
    path: str,
    chain: Sequence[x509.Certificate],
    *,
    authorities: Sequence[x509.Certificate],
    authority_path: str,
    endpoint: str,
    now_s: float,
) -> None:
    """Whether `chain`, our own certificate first, can stand for a server or client now.

    Raises: ImageError.
    """
    own = chain[0]
    for certificate in chain:
        _check_dates(path, certificate, now_s)
    constraints = _extension(own, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise ImageError(path, f"is an authority's certificate, and not a {endpoint}'s")
    usage = _extension(own, x509.KeyUsage)
    if usage is not None and not (usage.digital_signature or usage.key_encipherment):
        raise ImageError(path, "may be used neither to sign nor to agree on keys, by its key usage")
    extended = _extension(own, x509.ExtendedKeyUsage)
    allowed = (_PURPOSES[endpoint], ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE)
    if extended is not None and not any(purpose in extended for purpose in allowed):
        raise ImageError(path, f"is not for use by a {endpoint}, by its extended key usage")
    if not _leads_to(chain, authorities):
        raise ImageError(path, f"wasn't issued by an authority in {authority_path}")


def subject_name(certificate_der: bytes) -> str:
    """The distinguished name of whom a certificate is about: `C=GB,O=Example,CN=laptop`.

    As QEMU's (that is, GnuTLS's): escaped as in RFC 4514, but in the certificate's order, where the
    RFC begins at the end. Attributes that neither knows look different.
    """
    subject = x509.load_der_x509_certificate(certificate_der).subject
    return ",".join(part.rfc4514_string(_ATTRIBUTE_NAMES) for part in subject.rdns)


def _leads_to(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    current = chain[0]
    for _ in range(CHAIN_LENGTH_MAX):
        if any(current == authority or _issued(authority, current) for authority in authorities):
            return True
        issuers = [other for other in chain if other != current and _issued(other, current)]
        if not issuers:
            return False
        current = issuers[0]
    return False


def _issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _check_dates(path: str, certificate: x509.Certificate, now_s: float) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now_s < begin.timestamp():
        raise ImageError(path, f"is a certificate that is valid from {begin:%Y-%m-%d %H:%M} UTC on")
    if now_s > end.timestamp():
        raise ImageError(path, f"is a certificate that has expired ({end:%Y-%m-%d %H:%M} UTC)")


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):
        return None
