"""Shared secrets, private keys, certificates and authorities of a daemon, and how one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from kernel_shim.secret import Secret
from vpnd.config.model import Configuration, PrivateKeySource, SharedSecret
from vpnd.ike.identity import Identity

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class CredentialError(ValueError):
    """A key or certificate that cannot be used; the text names what is wrong and never shows a secret."""


@dataclass(frozen=True, slots=True)
class LoadedKey:
    """A private key. `identifier` is the hex of SHA-1 over the subjectPublicKey bits, as strongSwan's VICI `load-key` returns."""

    identifier: str
    key: PrivateKey


class CredentialStore:
    """Mutable; one a daemon."""

    @classmethod
    def of(cls, configuration: Configuration) -> CredentialStore:
        """CredentialError for the first credential that does not load."""
        raise NotImplementedError

    def load_shared(self, secret: SharedSecret) -> None: ...
    def unload_shared(self, name: str) -> None: ...
    def shared_names(self) -> Sequence[str]:
        raise NotImplementedError

    def load_key(self, source: PrivateKeySource) -> str:
        """The key's identifier. CredentialError when it is no key, of an unknown kind, or the passphrase is wrong."""
        raise NotImplementedError

    def unload_key(self, identifier: str) -> None: ...
    def key_ids(self) -> Sequence[str]:
        raise NotImplementedError

    def load_certificate(self, der: bytes, *, authority: bool) -> x509.Certificate:
        """CredentialError when it does not parse or its key is of an unknown kind."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget everything."""

    def shared_secret(self, local: Identity, remote: Identity) -> Secret | None:
        """The best match of both identities."""
        raise NotImplementedError
