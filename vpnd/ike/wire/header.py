"""The IKE header (RFC 7296 section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NewType

IkeSpi = NewType("IkeSpi", bytes)  # 8 octets
MessageId = NewType("MessageId", int)

NO_SPI: Final = IkeSpi(bytes(8))
HEADER_LENGTH: Final = 28


@dataclass(frozen=True, slots=True)
class Header:
    """`initiator`: the sender is the original initiator of the IKE SA. `response`: this answers a request."""

    initiator_spi: IkeSpi
    responder_spi: IkeSpi
    exchange: int
    message_id: MessageId
    initiator: bool
    response: bool
    minor_version: int = 0
    higher_version: bool = False
