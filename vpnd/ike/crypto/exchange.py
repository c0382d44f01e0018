"""What a key exchange method (transform types 4 and 6 to 12) is to its users: Diffie-Hellman in `dh`, KEMs in `mlkem`, all of them by number in `groups`."""

from __future__ import annotations

from typing import Protocol

from kernel_shim.secret import Secret
from vpnd.ike.crypto import Entropy
from vpnd.ike.wire.errors import MalformedMessage


class InvalidPublicValue(MalformedMessage):
    """A peer's public value fails the tests of RFC 6989; answered with INVALID_SYNTAX."""

    def __init__(self, detail: str) -> None:
        super().__init__("KE", detail)


class KeyExchange(Protocol):
    """The initiator's half of one key exchange: our public value is out, the peer's is awaited."""

    @property
    def group(self) -> int: ...

    @property
    def public(self) -> bytes: ...

    def complete(self, peer: bytes) -> Secret:
        """The shared secret. Raises InvalidPublicValue."""


class Group(Protocol):
    """A key exchange method. `respond` exists apart from `initiate` because a KEM's responder encapsulates."""

    @property
    def id(self) -> int: ...

    @property
    def public_length(self) -> int:
        """Octets of the initiator's public value."""

    def initiate(self, entropy: Entropy) -> KeyExchange: ...

    def respond(self, peer: bytes, entropy: Entropy) -> tuple[bytes, Secret]:
        """Our public value and the shared secret. Raises InvalidPublicValue."""
