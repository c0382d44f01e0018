"""Certificates of peers: RFC 5280 with one CA level, identities as in RFC 4945."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtensionOID

from vpnd.auth.der import DerError, canonical_name
from vpnd.auth.signature import PublicKey
from vpnd.ike.iana import IdType
from vpnd.ike.identity import Identity

MAX_CERTIFICATE_OCTETS: Final = 16384  # no sensible certificate is larger; a parser need not see more

_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)
_WEAK_HASHES: Final = (hashes.MD5, hashes.SHA1)
_UNREADABLE: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType)


class CertificateRefused(Exception):
    """A certificate that does not stand; the text is safe to log."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A parsed certificate with a public key of a kind that we verify with."""

    der: bytes
    parsed: x509.Certificate
    public_key: PublicKey
    extensions: x509.Extensions

    @classmethod
    def parse(cls, der: bytes) -> Self:
        """CertificateRefused, whatever the octets are."""
        if len(der) > MAX_CERTIFICATE_OCTETS:
            raise CertificateRefused("certificate is too large")
        try:
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            extensions = certificate.extensions
            certificate.subject.public_bytes()  # what is parsed late is parsed here
            certificate.issuer.public_bytes()
            certificate.not_valid_after_utc, certificate.not_valid_before_utc  # noqa: B018
        except _UNREADABLE as error:
            raise CertificateRefused("certificate does not parse") from error
        if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
            raise CertificateRefused("certificate's key is neither RSA nor ECDSA nor Ed25519")
        return cls(der, certificate, key, extensions)

    @property
    def subject(self) -> Identity:
        return Identity.of_dn(self.parsed.subject.public_bytes())

    @property
    def key_id(self) -> str:
        """Hex of SHA-1 over the subjectPublicKey bits."""
        return x509.SubjectKeyIdentifier.from_public_key(self.public_key).digest.hex()

    @property
    def public_key_hash(self) -> bytes:
        """RFC 7296 section 3.7: SHA-1 over the SubjectPublicKeyInfo, as CERTREQ names an authority."""
        info = self.public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha1(info, usedforsecurity=False).digest()

    def asserts(self, identity: Identity) -> bool:
        """RFC 4945 section 3.1: whether the certificate says that its holder is `identity`. No wildcards."""
        if identity.type == IdType.DER_ASN1_DN:
            return self._has_subject(identity.data)
        names = self._alternative_names()
        if names is None:
            return False
        # RFC 4945 section 3.1.1: the address in the ID payload must be an iPAddress of the certificate
        if identity.type in (IdType.IPV4_ADDR, IdType.IPV6_ADDR):
            try:
                return ip_address(identity.data) in names.get_values_for_type(x509.IPAddress)
            except ValueError:
                return False
        text = identity.data.decode("ascii", "replace").lower()
        # RFC 4945 section 3.1.2: dNSName, compared without case
        if identity.type == IdType.FQDN:
            return any(text == name.lower() for name in names.get_values_for_type(x509.DNSName))
        # RFC 4945 section 3.1.3
        if identity.type == IdType.RFC822_ADDR:
            return any(text == name.lower() for name in names.get_values_for_type(x509.RFC822Name))
        return False

    def _has_subject(self, der: bytes) -> bool:
        subject = self.parsed.subject.public_bytes()
        if subject == der:
            return bool(self.parsed.subject.rdns)
        try:
            return bool(self.parsed.subject.rdns) and canonical_name(subject) == canonical_name(der)
        except DerError:
            return False

    def _alternative_names(self) -> x509.SubjectAlternativeName | None:
        try:
            return self.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return None

    def check_authority(self) -> None:
        """CertificateRefused unless RFC 5280 section 4.2.1 lets it issue certificates."""
        try:
            if not self.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                raise CertificateRefused("certificate is not that of a CA (basicConstraints)")
        except x509.ExtensionNotFound:
            raise CertificateRefused("certificate is not that of a CA (no basicConstraints)") from None
        try:
            if not self.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
                raise CertificateRefused("CA may not sign certificates (keyUsage)")
        except x509.ExtensionNotFound:
            pass
        self._check_critical()

    @property
    def is_authority(self) -> bool:
        try:
            self.check_authority()
        except CertificateRefused:
            return False
        return True

    def check_end_entity(self) -> None:
        # RFC 4945 section 5.1.3.2: with keyUsage, digitalSignature or nonRepudiation must be set
        try:
            usage = self.extensions.get_extension_for_class(x509.KeyUsage).value
            if not usage.digital_signature and not usage.content_commitment:
                raise CertificateRefused("certificate may not be used for signatures (keyUsage)")
        except x509.ExtensionNotFound:
            pass
        self._check_critical()

    def check_validity(self, utc: datetime) -> None:
        if utc < self.parsed.not_valid_before_utc:
            raise CertificateRefused("certificate is not valid yet")
        if utc > self.parsed.not_valid_after_utc:
            raise CertificateRefused("certificate has expired")

    def check_issued_by(self, authority: Certificate) -> None:
        try:
            if isinstance(self.parsed.signature_hash_algorithm, _WEAK_HASHES):
                raise CertificateRefused("certificate is signed with a weak hash")
            self.parsed.verify_directly_issued_by(authority.parsed)
        except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CertificateRefused("certificate's signature does not verify") from error

    def _check_critical(self) -> None:
        # RFC 5280 section 4.2: an unrecognized critical extension refuses the certificate
        for extension in self.extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD:
                raise CertificateRefused(f"certificate has the critical extension {extension.oid.dotted_string}")


def check_peer(certificate: Certificate, identity: Identity, *, pinned: Collection[bytes], authorities: Sequence[Certificate], utc: datetime) -> None:
    """CertificateRefused unless `certificate` is that of `identity` and is trusted at `utc`.

    Trusted is what equals one of the `pinned` (DER), or is issued by one of the `authorities`.
    """
    if not certificate.asserts(identity):
        raise CertificateRefused(f"certificate does not assert the identity {identity}")
    certificate.check_validity(utc)
    certificate.check_end_entity()
    if certificate.der in pinned:
        return
    issuers = [authority for authority in authorities if authority.parsed.subject == certificate.parsed.issuer]
    if not issuers:
        raise CertificateRefused(f"certificate is issued by an unknown CA ({certificate.parsed.issuer.rfc4514_string()})")
    refusal = CertificateRefused("no CA")
    for authority in issuers:  # several may share a name, after a change of keys
        try:
            authority.check_authority()
            authority.check_validity(utc)
            certificate.check_issued_by(authority)
        except CertificateRefused as error:
            refusal = error
        else:
            return
    raise refusal
