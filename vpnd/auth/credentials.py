"""Shared secrets, private keys, certificates and authorities of a daemon, and how one is chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from kernel_shim.secret import Secret
from vpnd.auth.signature import PrivateKey, PublicKey
from vpnd.auth.x509 import Certificate, CertificateRefused
from vpnd.config.model import AuthRound, Configuration, PrivateKeySource, SharedSecret
from vpnd.ike.identity import Identity

K = TypeVar("K")
V = TypeVar("V")


class CredentialError(ValueError):
    """A key or certificate that cannot be used; the text names what is wrong and never shows a secret."""


@dataclass(frozen=True, slots=True)
class LoadedKey:
    """A private key. `identifier` is the hex of SHA-1 over the subjectPublicKey bits, as strongSwan's VICI `load-key` returns."""

    identifier: str
    key: PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """What we sign with. `identity` is the one that we claim."""

    identity: Identity
    certificate: Certificate
    key: PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class LoadedCertificate:
    """As a listing shows it. `has_key`: we have its private key."""

    certificate: Certificate
    authority: bool
    has_key: bool


class CredentialStore:
    """Mutable; one a daemon."""

    def __init__(self) -> None:
        self._shared: dict[str, SharedSecret] = {}
        self._keys: dict[str, LoadedKey] = {}
        self._certificates: dict[bytes, Certificate] = {}  # by DER
        self._authorities: dict[bytes, Certificate] = {}

    @classmethod
    def of(cls, configuration: Configuration) -> CredentialStore:
        """CredentialError for the first credential that does not load. Certificates that a connection names are loaded too."""
        store = cls()
        for secret in configuration.shared.values():
            store.load_shared(secret)
        for source in configuration.private_keys:
            store.load_key(source)
        for der in configuration.certificates:
            store.load_certificate(der, authority=False)
        for der in configuration.authorities:
            store.load_certificate(der, authority=True)
        return store

    def load_shared(self, secret: SharedSecret) -> None:
        self._shared[secret.name] = secret

    def unload_shared(self, name: str) -> None:
        self._shared.pop(name, None)

    def shared_names(self) -> Sequence[str]:
        return tuple(self._shared)

    def load_key(self, source: PrivateKeySource) -> str:
        """The key's identifier. CredentialError when it is no key, of an unknown kind, or the passphrase is wrong."""
        loaded = parse_private_key(source)
        self._keys[loaded.identifier] = loaded
        return loaded.identifier

    def unload_key(self, identifier: str) -> None:
        self._keys.pop(identifier.lower(), None)

    def key_ids(self) -> Sequence[str]:
        return tuple(self._keys)

    def load_certificate(self, der: bytes, *, authority: bool) -> x509.Certificate:
        """CredentialError when it does not parse or its key is of an unknown kind."""
        try:
            certificate = Certificate.parse(der)
            if authority:
                certificate.check_authority()
        except CertificateRefused as error:
            raise CredentialError(str(error)) from error
        (self._authorities if authority else self._certificates)[certificate.der] = certificate
        return certificate.parsed

    def exchange(self, old: CredentialStore, new: CredentialStore) -> int:
        """Take out what `old` brought and put in what `new` brings; how many came or went. What is in neither stays."""
        return (
            _exchange(self._shared, old._shared, new._shared)
            + _exchange(self._keys, old._keys, new._keys)
            + _exchange(self._certificates, old._certificates, new._certificates)
            + _exchange(self._authorities, old._authorities, new._authorities)
        )

    def clear(self) -> None:
        """Forget everything."""
        for table in (self._shared, self._keys, self._certificates, self._authorities):
            table.clear()

    @property
    def authorities(self) -> Collection[Certificate]:
        return self._authorities.values()

    @property
    def certificates(self) -> Collection[Certificate]:
        return self._certificates.values()

    def listed(self) -> Sequence[LoadedCertificate]:
        """Certificates first, then authorities that are not among them."""
        further = {der: certificate for der, certificate in self._authorities.items() if der not in self._certificates}
        found = [*self._certificates.values(), *further.values()]
        return [LoadedCertificate(each, each.is_authority, each.key_id in self._keys) for each in found]

    def shared_secret(self, local: Identity, remote: Identity) -> Secret | None:
        """The best match of both identities; the peer's counts more.

        As strongSwan's credential manager chooses, but a secret with several owners is never given to a peer that is none of them.
        """
        best: tuple[int, int] = (0, 0)
        chosen: SharedSecret | None = None
        for secret in self._shared.values():
            if secret.ppk:
                continue
            quality = _ownership(secret, local, remote)
            if quality > best:
                best, chosen = quality, secret
        return Secret(chosen.data) if chosen else None

    @property
    def has_ppk(self) -> bool:
        return any(secret.ppk for secret in self._shared.values())

    def ppk(self, ppk_id: bytes) -> Secret | None:
        """The post-quantum pre-shared key of that PPK_ID; one that names it goes before one that names none."""
        candidates = [secret for secret in self._shared.values() if secret.ppk]
        named = [secret for secret in candidates if any(owner.data == ppk_id for owner in secret.owners)]
        chosen = next(iter([*named, *(secret for secret in candidates if not secret.owners)]), None)
        return Secret(chosen.data) if chosen else None

    def own_certificate(self, local: AuthRound, requested: Collection[bytes] = ()) -> OwnCertificate | None:
        """The certificate for `local` whose key we have; one of the `requested` authorities (SHA-1 of their public keys) goes first."""
        named = _parsed(local.certs)
        pool = named or [certificate for certificate in self._certificates.values() if local.id is None or local.id.any or certificate.asserts(local.id)]
        keys: Mapping[str, LoadedKey] = self._keys
        usable = [certificate for certificate in pool if certificate.key_id in keys]
        if not usable:
            return None
        if requested:
            wanted = {authority.parsed.subject for authority in self._authorities.values() if authority.public_key_hash in requested}
            usable.sort(key=lambda certificate: certificate.parsed.issuer not in wanted)
        certificate = usable[0]
        identity = local.id if local.id is not None and not local.id.any and certificate.asserts(local.id) else certificate.subject
        return OwnCertificate(identity, certificate, keys[certificate.key_id].key)


def _exchange(table: dict[K, V], old: Mapping[K, V], new: Mapping[K, V]) -> int:
    gone = [key for key in old if key not in new and table.pop(key, None) is not None]
    # a key or certificate has its content as its name; a secret may have another content
    come = [key for key, value in new.items() if key not in table or (isinstance(value, SharedSecret) and table[key] != value)]
    table.update((key, new[key]) for key in come)
    return len(gone) + len(come)


def _parsed(ders: Sequence[bytes]) -> list[Certificate]:
    certificates = []
    for der in ders:
        try:
            certificates.append(Certificate.parse(der))
        except CertificateRefused:
            continue
    return certificates


def _ownership(secret: SharedSecret, local: Identity, remote: Identity) -> tuple[int, int]:
    """(quality of the peer's match, of ours); (0, 0) when the secret is not for these two."""
    if not secret.owners:
        return (1, 1)
    of_remote = max(remote.match_quality(owner) for owner in secret.owners)
    of_local = [local.match_quality(owner) for owner in secret.owners]
    if not of_remote and not all(of_local):
        return (0, 0)
    return (of_remote, max(of_local))


def parse_private_key(source: PrivateKeySource) -> LoadedKey:
    """PEM or DER; PKCS#8 (also encrypted), PKCS#1 or SEC1. CredentialError, which never shows the key."""
    load = serialization.load_pem_private_key if source.data.lstrip().startswith(b"-----BEGIN") else serialization.load_der_private_key
    try:
        key = load(source.data, source.passphrase)
    except TypeError as error:
        if source.passphrase is None:
            raise CredentialError("the private key is encrypted and no passphrase is given") from error
        return parse_private_key(PrivateKeySource(source.data))  # a passphrase that the key does not need
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CredentialError("not a private key that can be read, or a wrong passphrase") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise CredentialError("the private key is neither RSA nor ECDSA nor Ed25519")
    return LoadedKey(key_identifier(key.public_key()), key)


def key_identifier(key: PublicKey) -> str:
    """Hex of SHA-1 over the subjectPublicKey bits."""
    return x509.SubjectKeyIdentifier.from_public_key(key).digest.hex()
