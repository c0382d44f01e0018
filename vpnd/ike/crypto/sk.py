"""The protection of SK payloads: RFC 7296 section 3.14 (CBC and HMAC) and RFC 5282 (AEAD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kernel_shim.secret import Secret
from vpnd.ike.crypto import Entropy
from vpnd.ike.proposal import Transform
from vpnd.ike.wire.header import Header
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import Payload


class SkCipher(Protocol):
    """One direction of one IKE SA. Padding is the cipher's own business: plaintext is the payload chain."""

    def sealed_length(self, length: int) -> int:
        """Octets of IV, ciphertext, padding and ICV for that many octets of plaintext."""

    def seal(self, associated: bytes, plaintext: bytes, entropy: Entropy) -> bytes:
        """IV, ciphertext and ICV. `associated` is the message up to and with the SK payload's generic header, lengths final."""

    def open(self, associated: bytes, body: bytes) -> bytes:
        """The payload chain. Raises IntegrityFailure, or MalformedMessage for padding that lies."""


def encryption_key_length(encryption: Transform) -> int:
    """Octets of SK_e: key and, for an AEAD, salt. Raises KeyError when it is not implemented for IKE."""
    raise NotImplementedError


def integrity_key_length(integrity: Transform | None) -> int:
    """Octets of SK_a; 0 beside an AEAD."""
    raise NotImplementedError


def sk_cipher(encryption: Transform, integrity: Transform | None, encryption_key: Secret, integrity_key: Secret) -> SkCipher:
    """The cipher of one direction: SK_ei and SK_ai, or SK_er and SK_ar. Raises KeyError when it is not implemented."""
    raise NotImplementedError


def seal_message(header: Header, payloads: Sequence[Payload], cipher: SkCipher, entropy: Entropy) -> bytes:
    """A whole message with all its payloads inside SK."""
    raise NotImplementedError


def open_message(data: bytes, message: Message, cipher: SkCipher) -> Message:
    """`message` (decoded from `data`) with its SK payload replaced by what is inside. Raises IntegrityFailure or MalformedMessage."""
    raise NotImplementedError
