"""A certification authority of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from vpnd.auth.signature import PrivateKey
from vpnd.config.model import PrivateKeySource

BEGIN = datetime(2025, 1, 1, tzinfo=UTC)
END = datetime(2035, 1, 1, tzinfo=UTC)


@cache
def key(kind: str, number: int = 0) -> PrivateKey:
    """One key a kind and number for the whole run: RSA keys are slow to make."""
    match kind:
        case "rsa":
            return rsa.generate_private_key(65537, 2048)
        case "rsa1024":
            return rsa.generate_private_key(65537, 1024)
        case "ecdsa256":
            return ec.generate_private_key(ec.SECP256R1())
        case "ecdsa384":
            return ec.generate_private_key(ec.SECP384R1())
        case "ecdsa521":
            return ec.generate_private_key(ec.SECP521R1())
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()
    raise ValueError(kind)


def source(private: PrivateKey) -> PrivateKeySource:
    return PrivateKeySource(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "CH"), x509.NameAttribute(NameOID.COMMON_NAME, common)])


@dataclass(frozen=True)
class Authority:
    common: str = "Test CA"
    kind: str = "ecdsa256"
    number: int = 99
    ca: bool = True
    sign_usage: bool = True

    @property
    def key(self) -> PrivateKey:
        return key(self.kind, self.number)

    @property
    def der(self) -> bytes:
        extensions: list[tuple[x509.ExtensionType, bool]] = [(x509.BasicConstraints(self.ca, None), True), (usage(cert_sign=self.sign_usage), True)]
        return _build(name(self.common), name(self.common), self.key, self.key, extensions, BEGIN, END)

    def issue(
        self,
        common: str,
        private: PrivateKey,
        names: Sequence[str] = (),
        *,
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
        begin: datetime = BEGIN,
        end: datetime = END,
    ) -> bytes:
        """`names` are dNSNames, rfc822Names (with @) and iPAddresses."""
        added = list(extensions)
        if names:
            added.append((x509.SubjectAlternativeName([_general(text) for text in names]), False))
        return _build(name(common), name(self.common), private, self.key, added, begin, end)


def usage(*, signature: bool = True, cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(signature, False, False, False, False, cert_sign, False, False, False)


def _general(text: str) -> x509.GeneralName:
    if "@" in text:
        return x509.RFC822Name(text)
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _build(
    subject: x509.Name,
    issuer: x509.Name,
    private: PrivateKey,
    signer: PrivateKey,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
    begin: datetime,
    end: datetime,
) -> bytes:
    builder = x509.CertificateBuilder(issuer, subject, private.public_key(), x509.random_serial_number(), begin, end + timedelta(0))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(signer, algorithm).public_bytes(serialization.Encoding.DER)
