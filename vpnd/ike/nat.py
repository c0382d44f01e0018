"""NAT detection (RFC 7296 section 2.23)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from kernel_shim.model import PORT_IKE, PORT_NAT_T, Endpoint
from vpnd.ike.iana import NotifyType
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload

HASH_LENGTH: Final = 20
MAX_SOURCE_HASHES: Final = 32  # a peer may name several addresses of its own; no more are looked at


def detection_hash(spi_i: bytes, spi_r: bytes, endpoint: Endpoint) -> bytes:
    """SHA-1 of SPIs, address and port, all in network byte order."""
    return hashlib.sha1(spi_i + spi_r + endpoint.address.packed + endpoint.port.to_bytes(2, "big"), usedforsecurity=False).digest()


def detection_payloads(spi_i: bytes, spi_r: bytes, local: Endpoint, remote: Endpoint, fake: bytes | None) -> tuple[NotifyPayload, NotifyPayload]:
    """What we say of both ends. `fake` in place of our own hash makes the peer believe in a NAT before us: that forces UDP encapsulation."""
    return (
        NotifyPayload(NotifyType.NAT_DETECTION_SOURCE_IP, fake or detection_hash(spi_i, spi_r, local)),
        NotifyPayload(NotifyType.NAT_DETECTION_DESTINATION_IP, detection_hash(spi_i, spi_r, remote)),
    )


def detect(message: Message, spi_i: bytes, spi_r: bytes, local: Endpoint, remote: Endpoint) -> tuple[bool, bool] | None:
    """(we are behind a NAT, the peer is), for a message that came from `remote` to `local`; None when the peer does not do NAT traversal."""
    sources = message.notifies(NotifyType.NAT_DETECTION_SOURCE_IP)[:MAX_SOURCE_HASHES]
    destination = message.notify(NotifyType.NAT_DETECTION_DESTINATION_IP)
    if not sources or destination is None:
        return None
    nat_remote = not _among(detection_hash(spi_i, spi_r, remote), (payload.data for payload in sources))
    nat_local = not _among(detection_hash(spi_i, spi_r, local), (destination.data,))
    return nat_local, nat_remote


def _among(expected: bytes, given: Iterable[bytes]) -> bool:
    return any(hmac.compare_digest(expected, data) for data in given)


def floated(endpoint: Endpoint) -> Endpoint:
    """RFC 7296 section 2.23: after a NAT was found, IKE moves from port 500 to port 4500. Other ports stay."""
    return endpoint._replace(port=PORT_NAT_T) if endpoint.port == PORT_IKE else endpoint
