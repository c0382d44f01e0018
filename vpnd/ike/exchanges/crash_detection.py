"""Quick crash detection (RFC 6290): a peer that lost its IKE SAs proves it with a token that it gave out while it had them.

The maker of a token keeps nothing but one secret, which outlives it. The taker believes a token of exactly its IKE SA and begins anew at once.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from vpnd.ike.iana import NotifyType, ProtocolId
from vpnd.ike.session import Session
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.header import NO_SPI, Header
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import NotifyPayload, Payload

# Of the specification: RFC 6290 section 4.1
TOKEN_MINIMUM: Final = 16  # octets
TOKEN_MAXIMUM: Final = 128

# Of this implementation
SECRET_LENGTH: Final = 32
SHORTEST_REQUEST: Final = 56  # octets; a protected request is no shorter, so that our answer is not much longer than what asked for it
MAX_TOKENS: Final = 4  # of one answer that are compared


class TokenMaker:
    """RFC 6290 section 5.1: nothing but the secret is needed to make a token again. MOBIKE rules the peer's address out as an ingredient."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, spi_i: bytes, spi_r: bytes) -> bytes:
        return hmac.digest(self._secret, spi_i + spi_r, hashlib.sha256)

    def answer(self, datagram: bytes) -> bytes | None:
        """What a protected request of an IKE SA that we do not have gets (RFC 7296 section 1.5); None: nothing.

        The caller makes sure that none of the two SPIs is that of an IKE SA of ours, whichever flags the datagram has:
        the token of one that stands must not become known.
        """
        try:
            message = decode_message(datagram)
        except MalformedMessage:
            return None
        header = message.header
        if len(datagram) < SHORTEST_REQUEST or header.response or message.encrypted is None or header.responder_spi == NO_SPI:
            return None
        reply = Header(header.initiator_spi, header.responder_spi, header.exchange, header.message_id, initiator=not header.initiator, response=True)
        token = NotifyPayload(NotifyType.QUICK_CRASH_DETECTION, self.make(header.initiator_spi, header.responder_spi), ProtocolId.IKE)
        return encode_message(Message(reply, (NotifyPayload(NotifyType.INVALID_IKE_SPI), token)))


# While the IKE SA stands


def token_payloads(session: Session) -> tuple[Payload, ...]:
    """For IKE_AUTH and the answer to a rekeying, once both SPIs are known."""
    token = session.context.crash_token(session.wire_spi_i, session.wire_spi_r)
    return (NotifyPayload(NotifyType.QUICK_CRASH_DETECTION, token, ProtocolId.IKE),) if token else ()


def keep_token(session: Session, message: Message) -> None:
    """The peer's, for this IKE SA."""
    notify = message.notify(NotifyType.QUICK_CRASH_DETECTION)
    if notify is not None and TOKEN_MINIMUM <= len(notify.data) <= TOKEN_MAXIMUM:
        session.crash_token = notify.data


# When the peer has lost it


def proves_loss(session: Session, message: Message) -> bool:
    """RFC 6290 section 4.2: an unprotected answer with the very token that the peer gave us for this IKE SA. Its SPIs were compared before."""
    if not session.crash_token or not message.header.response or message.encrypted is not None or message.notify(NotifyType.INVALID_IKE_SPI) is None:
        return False
    given = message.notifies(NotifyType.QUICK_CRASH_DETECTION)[:MAX_TOKENS]
    return any([hmac.compare_digest(session.crash_token, notify.data) for notify in given])  # noqa: C419  # all are compared, whichever fits
