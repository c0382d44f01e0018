"""Cookies against floods of half-open IKE SAs, and replies that keep no state (RFC 7296 sections 2.5 and 2.6)."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import IPAddress
from vpnd.ike.crypto import Entropy
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.header import HEADER_LENGTH, NO_SPI, Header, IkeSpi, MessageId, decode_header
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import NoncePayload, NotifyPayload

# Of the specification

COOKIE_MAXIMUM: Final = 64  # octets, RFC 7296 section 2.6
MAJOR_VERSION: Final = 2

# Of this implementation

SECRET_LIFETIME: Final = 60.0  # s; a cookie stands for one to two of it
SECRET_LENGTH: Final = 32


class CookieJar:
    """Makes and checks cookies without memory of either. The secret changes by itself; the one before it still counts."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._version = 0
        self._since: float | None = None  # the first use
        self._current = entropy(SECRET_LENGTH)
        self._previous: bytes | None = None

    def make(self, nonce: bytes, address: IPAddress, spi: bytes, now: float) -> bytes:
        """Version octet, then HMAC-SHA-256 over Ni | IPi | SPIi."""
        self._rotate(now)
        return bytes([self._version]) + _digest(self._current, nonce, address, spi)

    def check(self, cookie: bytes, nonce: bytes, address: IPAddress, spi: bytes, now: float) -> bool:
        """In constant time for cookies of the right length."""
        self._rotate(now)
        if not 1 < len(cookie) <= COOKIE_MAXIMUM:
            return False
        secret = self._current if cookie[0] == self._version else self._previous if cookie[0] == (self._version - 1) % 256 else None
        return secret is not None and hmac.compare_digest(cookie[1:], _digest(secret, nonce, address, spi))

    def _rotate(self, now: float) -> None:
        if self._since is None:
            self._since = now
        age = now - self._since
        if age < SECRET_LIFETIME:
            return
        self._previous = self._current if age < 2 * SECRET_LIFETIME else None
        self._current = self._entropy(SECRET_LENGTH)
        self._version = (self._version + 1) % 256
        self._since = now


def _digest(secret: bytes, nonce: bytes, address: IPAddress, spi: bytes) -> bytes:
    return hmac.digest(secret, bytes([len(nonce) & 0xFF]) + nonce + address.packed + spi, hashlib.sha256)


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What a gate reads of an IKE_SA_INIT or IKE_SESSION_RESUME request."""

    header: Header
    nonce: bytes
    cookie: bytes | None

    @property
    def spi(self) -> int:
        return int.from_bytes(self.header.initiator_spi, "big")


def parse_init_request(datagram: bytes) -> InitRequest | None:
    """None when it is not a request that may open an IKE SA."""
    try:
        message = decode_message(datagram)
    except MalformedMessage:
        return None
    nonce = message.first(NoncePayload)
    if not _opens(message.header) or nonce is None:
        return None
    cookie = message.notify(NotifyType.COOKIE)
    return InitRequest(message.header, nonce.data, cookie.data if cookie else None)


def _opens(header: Header) -> bool:
    opening = header.exchange in (Exchange.IKE_SA_INIT, Exchange.IKE_SESSION_RESUME) and header.message_id == 0
    return opening and header.initiator and not header.response and header.responder_spi == NO_SPI


def cookie_reply(request: InitRequest, cookie: bytes) -> bytes:
    # RFC 7296 section 2.6
    return stateless_reply(request.header, NotifyType.COOKIE, cookie)


def stateless_reply(request: Header, notify: int, data: bytes = b"") -> bytes:
    """A response of one notification, for which nothing is remembered."""
    header = Header(request.initiator_spi, request.responder_spi, request.exchange, request.message_id, initiator=False, response=True)
    return encode_message(Message(header, (NotifyPayload(notify, data),)))


def unsupported_critical_payload(datagram: bytes) -> bytes | None:
    """RFC 7296 section 2.5: the answer to a request that may open an IKE SA, for a critical payload that we do not know; None when none is due."""
    try:
        decode_message(datagram)
    except MalformedMessage as error:
        # the header was read before any payload
        if error.notify == NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD and _opens(header := decode_header(datagram)):
            return stateless_reply(header, error.notify, error.data)
    return None


def invalid_major_version(datagram: bytes) -> bytes | None:
    """RFC 7296 section 2.5: the answer to a request of a higher major version; None when none is due."""
    if len(datagram) < HEADER_LENGTH or datagram[17] >> 4 <= MAJOR_VERSION or datagram[19] & 0x20:
        return None
    message_id = MessageId(int.from_bytes(datagram[20:24], "big"))
    header = Header(IkeSpi(datagram[:8]), IkeSpi(datagram[8:16]), datagram[18], message_id, initiator=False, response=True)
    return encode_message(Message(header, (NotifyPayload(NotifyType.INVALID_MAJOR_VERSION),)))
