"""What the two exchanges that open an IKE SA have alike, IKE_SA_INIT (RFC 7296 section 1.2) and IKE_SESSION_RESUME (RFC 5723): unprotected, SPIs, nonces."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_shim.model import Endpoint
from vpnd.auth.signature import SUPPORTED_HASHES
from vpnd.config.model import Fragmentation
from vpnd.ike.effects import Effect, Send
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.nat import detection_payloads, floated
from vpnd.ike.session import Session
from vpnd.ike.state import IkeSaState
from vpnd.ike.steps import NONCE_LENGTH
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.header import NO_SPI, Header, MessageId
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import NotifyPayload, Payload, VendorIdPayload


def capabilities(session: Session, spi_r: bytes, local: Endpoint, remote: Endpoint, fake: bytes | None) -> list[Payload]:
    context, spi_i = session.context, session.wire_spi_i
    # RFC 7427 section 4
    hashes = b"".join(number.to_bytes(2, "big") for number in SUPPORTED_HASHES)
    payloads: list[Payload] = [*detection_payloads(spi_i, spi_r, local, remote, fake), NotifyPayload(NotifyType.SIGNATURE_HASH_ALGORITHMS, hashes)]
    # RFC 7383 section 2.3
    if session.connection.fragmentation is not Fragmentation.NO:
        payloads.append(NotifyPayload(NotifyType.IKEV2_FRAGMENTATION_SUPPORTED))
    if context.settings.vendor_id:
        payloads.append(VendorIdPayload(context.settings.vendor_id))
    return payloads


def _features(session: Session, message: Message, local: Endpoint, remote: Endpoint, spi_r: bytes) -> None:
    session.notice_nat(message, session.wire_spi_i, spi_r, local, remote)
    announced = message.notify(NotifyType.IKEV2_FRAGMENTATION_SUPPORTED) is not None
    session.fragmentation = announced and session.connection.fragmentation is not Fragmentation.NO
    hashes = message.notify(NotifyType.SIGNATURE_HASH_ALGORITHMS)
    data = hashes.data if hashes else b""
    session.peer_hashes = tuple(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data) - 1, 2))


# Initiator


def first_request(session: Session, exchange: Exchange, payloads: Sequence[Payload]) -> bytes:
    header = Header(session.wire_spi_i, NO_SPI, exchange, MessageId(0), initiator=True, response=False)
    session.init_request = encode_message(Message(header, tuple(payloads)))
    return session.init_request


def take_answer(session: Session, response: Message) -> None:
    """Of a response that gave us keys: what the responder can do, and where to go on."""
    _features(session, response, session.local, session.remote, response.header.responder_spi)
    session.init_response = session.received
    session.peer_childless = response.notify(NotifyType.CHILDLESS_IKEV2_SUPPORTED) is not None
    # RFC 7296 section 2.23: a NAT, real or pretended, moves us to port 4500; RFC 4555 section 3.3: so does the wish for MOBIKE
    if session.nat_local or session.nat_remote or session.nat_fake or (session.nat_supported and session.connection.mobike):
        session.local, session.remote = floated(session.local), floated(session.remote)


# Responder


def read_request(datagram: bytes, exchange: Exchange) -> Message | None:
    """None for what opens no IKE SA."""
    try:
        request = decode_message(datagram)
    except MalformedMessage:
        # RFC 7296 section 2.21.1: what is not syntactically right and not protected is dropped
        return None
    header = request.header
    opens = header.exchange == exchange and header.initiator and not header.response and header.message_id == 0
    return request if opens and header.initiator_spi != NO_SPI and header.responder_spi == NO_SPI else None


def take_request(session: Session, datagram: bytes, request: Message, nonce: bytes, local: Endpoint, remote: Endpoint) -> None:
    """What the request says of the initiator; there are no keys yet."""
    session.state = IkeSaState.CONNECTING
    session.spi_remote = int.from_bytes(request.header.initiator_spi, "big")
    session.nonce_i, session.nonce_r = nonce, session.context.entropy(NONCE_LENGTH)
    session.init_request = datagram
    _features(session, request, local, remote, NO_SPI)


def answer(session: Session, exchange: Exchange, payloads: Sequence[Payload], local: Endpoint, remote: Endpoint) -> list[Effect]:
    header = Header(session.wire_spi_i, session.wire_spi_r, exchange, MessageId(0), initiator=False, response=True)
    session.init_response = encode_message(Message(header, tuple(payloads)))
    return [Send(local, remote, session.init_response)]
