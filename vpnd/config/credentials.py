"""Certificates, private keys and shared secrets: their messages, checked. Complaints never repeat what a secret holds."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from vpnd.config.errors import ConfigErrors
from vpnd.config.model import PrivateKeySource, SharedSecret
from vpnd.config.reader import Reader, shown
from vpnd.config.tree import Section
from vpnd.ike.identity import Identity

MAX_CREDENTIAL: Final = 64 * 1024 - 1  # bytes: the longest value of a VICI message
MAX_OWNERS: Final = 1000  # identities of one shared secret

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_KEY_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "any": (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey),
    "rsa": (rsa.RSAPrivateKey,),
    "ecdsa": (ec.EllipticCurvePrivateKey,),
    "ed25519": (ed25519.Ed25519PrivateKey,),
}
_KEY_TYPES_TO_COME: Final = ("dsa", "ed448", "bliss")
_CERTIFICATE_TYPES: Final = {"x509": False, "x509ca": True}
_CERTIFICATE_TYPES_TO_COME: Final = ("x509_ac", "x509ac", "x509_crl", "x509crl", "ocsp_response", "x509ocsp", "x509aa", "pubkey", "gpg")


class PassphraseNeeded(ValueError):
    """The private key is encrypted."""


def read_credential_file(path: str | Path) -> bytes:
    """Raises ValueError when it cannot be read or is too long."""
    if not Path(path).is_absolute():
        raise ValueError("the path of a file must be absolute here")
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_CREDENTIAL + 1)
    except OSError as error:
        raise ValueError(f"cannot read {shown(str(path))}: {error.strerror}") from None
    if len(data) > MAX_CREDENTIAL:
        raise ValueError(f"{shown(str(path))} is longer than {MAX_CREDENTIAL} bytes")
    return data


def certificate_der(data: bytes) -> bytes:
    """The DER of one X.509 certificate in PEM or DER. Raises ValueError."""
    try:
        certificate = x509.load_pem_x509_certificate(data) if b"-----BEGIN" in data else x509.load_der_x509_certificate(data)
        certificate.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ValueError(f"not an X.509 certificate that can be used: {shown(str(error))}") from None
    return certificate.public_bytes(serialization.Encoding.DER)


def is_authority(der: bytes) -> bool:
    """Whether basicConstraints say CA (RFC 5280 section 4.2.1.9)."""
    try:
        constraints = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.BasicConstraints)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        return False
    return constraints.value.ca


def load_private_key(data: bytes, passphrase: bytes | None = None) -> PrivateKey:
    """PEM or DER, PKCS#1, SEC 1 or PKCS#8. Raises PassphraseNeeded, or ValueError, also for a passphrase that is wrong."""
    load = serialization.load_pem_private_key if b"-----BEGIN" in data else serialization.load_der_private_key
    try:
        key = load(data, None)
    except TypeError:
        if passphrase is None:
            raise PassphraseNeeded("the private key is encrypted and no passphrase for it is configured") from None
        try:
            key = load(data, passphrase)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ValueError("the passphrase does not open the private key") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("not a private key that can be used") from None
    if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)):
        raise ValueError("a private key of this kind is not implemented yet")
    return key


def decode_secret(text: str) -> bytes:
    """Plain text, `0x` hex or `0s` base64, as swanctl decodes it before it sends it. Raises ValueError."""
    prefix, rest = text[:2].lower(), text[2:]
    try:
        if prefix == "0x":
            digits = rest.replace(":", "")
            return bytes.fromhex("0" * (len(digits) % 2) + digits)
        if prefix == "0s":
            return base64.b64decode(rest, validate=True)
    except (ValueError, binascii.Error):
        raise ValueError("hex digits were expected after '0x'" if prefix == "0x" else "base64 was expected after '0s'") from None
    return text.encode()


# The messages of `load-cert`, `load-key` and `load-shared`


def validate_certificate(message: Section) -> tuple[bytes, bool]:
    """The DER, and whether it is an authority."""
    reader = Reader(message, "load-cert", [])
    kind = reader.convert("type", None, _certificate_type)
    flag = reader.choice("flag", "none", {name: name for name in ("none", "ca", "aa", "ocsp")})
    if "type" not in message.entries:
        reader.complain("the certificate's type is missing")
    if flag in ("aa", "ocsp"):
        reader.complain(f"certificates with the flag '{flag}' are not implemented yet", "flag")
    der = _der(reader)
    authority = der is not None and is_authority(der)
    if der is not None and (kind or flag == "ca") and not authority:
        reader.complain("the CA certificate lacks the CA basic constraint", "data")
    reader.finish()
    if reader.errors or der is None:
        raise ConfigErrors(reader.errors)
    return der, authority


def _certificate_type(text: str) -> bool:
    kind = text.lower()
    if kind in _CERTIFICATE_TYPES_TO_COME:
        raise ValueError(f"certificates of type '{kind}' are not implemented yet")
    if kind not in _CERTIFICATE_TYPES:
        raise ValueError(f"'{shown(text)}' is not a certificate's type")
    return _CERTIFICATE_TYPES[kind]


def _der(reader: Reader) -> bytes | None:
    data = reader.blob("data")
    if not data:
        reader.complain("the certificate's data is missing", "data")
        return None
    try:
        return certificate_der(data)
    except ValueError as error:
        reader.complain(str(error), "data")
        return None


def validate_key(message: Section) -> PrivateKeySource:
    reader = Reader(message, "load-key", [])
    kinds = reader.convert("type", None, _key_type)
    if "type" not in message.entries:
        reader.complain("the key's type is missing")
    data = reader.blob("data")
    if not data:
        reader.complain("the key's data is missing", "data")
    else:
        try:
            key = load_private_key(data)
            if kinds and not isinstance(key, kinds):
                reader.complain("the key is of another type", "data")
        except ValueError as error:
            reader.complain(str(error), "data")
    reader.finish()
    if reader.errors or not data:
        raise ConfigErrors(reader.errors)
    return PrivateKeySource(data)


def _key_type(text: str) -> tuple[type, ...]:
    kind = text.lower()
    if kind in _KEY_TYPES_TO_COME:
        raise ValueError(f"keys of type '{kind}' are not implemented yet")
    if kind not in _KEY_TYPES:
        raise ValueError(f"'{shown(text)}' is not a key's type")
    return _KEY_TYPES[kind]


def validate_shared(message: Section, path: str = "load-shared") -> SharedSecret:
    """A secret without an id is named after its owners; such a name begins with `~`, and `get-shared` keeps it to itself."""
    reader = Reader(message, path, [])
    name = reader.text("id", "")
    ppk = reader.convert("type", False, _shared_type)
    if "type" not in message.entries:
        reader.complain("the secret's type is missing")
    data = reader.blob("data")
    if not data:
        reader.complain("the secret is missing", "data")
    owners = reader.convert_all("owners", Identity.parse)
    if len(owners) > MAX_OWNERS:
        reader.complain(f"more than {MAX_OWNERS} owners", "owners")
    reader.finish()
    if reader.errors or not data:
        raise ConfigErrors(reader.errors)
    named = tuple(owner for owner in owners if not owner.any)
    unnamed = ("~ppk~" if ppk else "~") + ",".join(str(owner) for owner in named)
    return SharedSecret(name or unnamed, data, named if len(named) == len(owners) else (), ppk)


def _shared_type(text: str) -> bool:
    """Whether it is a PPK."""
    kind = text.lower()
    if kind in ("eap", "xauth", "ntlm"):
        raise ValueError(f"secrets of type '{kind}' are not implemented yet")
    if kind not in ("ike", "ppk"):
        raise ValueError(f"'{shown(text)}' is not a secret's type")
    return kind == "ppk"
