"""Whole IKE messages with all their payloads inside SK, as a peer of the tests sends and reads them."""

from __future__ import annotations

from collections.abc import Sequence

from vpnd.ike.crypto import Entropy
from vpnd.ike.crypto.sk import SkCipher, open_chain, seal_chain
from vpnd.ike.wire.header import Header
from vpnd.ike.wire.message import Message, decode_payloads, encode_payloads
from vpnd.ike.wire.payloads import Payload, SkPayload


def seal_message(header: Header, payloads: Sequence[Payload], cipher: SkCipher, entropy: Entropy) -> bytes:
    """Raises ValueError when the payloads do not fit one message."""
    return seal_chain(header, *encode_payloads(payloads), cipher, entropy)


def open_message(data: bytes, message: Message, cipher: SkCipher) -> Message:
    """`message`, decoded from `data`, with what is inside its SK payload alone. Raises IntegrityFailure, after that check MalformedMessage."""
    sealed = message.encrypted
    assert isinstance(sealed, SkPayload)
    return Message(message.header, decode_payloads(sealed.first, open_chain(data, sealed, cipher)))
