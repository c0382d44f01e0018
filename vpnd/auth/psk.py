"""Authentication by a pre-shared key (RFC 7296 section 2.15)."""

from __future__ import annotations

import hmac

from kernel_shim.secret import Secret
from vpnd.ike.crypto.prf import Prf
from vpnd.ike.keymat import shared_key_auth


def psk_auth(prf: Prf, secret: Secret, octets: bytes) -> bytes:
    """AUTH data over `signed_octets`."""
    return shared_key_auth(prf, secret.reveal(), octets)


def psk_verifies(prf: Prf, secret: Secret, octets: bytes, data: bytes) -> bool:
    """Whether the peer's AUTH data is right; compared in constant time."""
    return hmac.compare_digest(psk_auth(prf, secret, octets), data)
