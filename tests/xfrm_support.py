"""An SA between two gateways, and its way through a netlink socket."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any, Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.model import Direction, Mode, ReqId, SecurityAssociation, Spi
from kernel_shim.secret import Secret
from kernel_shim.xfrm.wire import Message, decode, encode

HERE: Final = IPv4Address("192.0.2.1")
PEER: Final = IPv4Address("192.0.2.2")


def make_sa(**changes: Any) -> SecurityAssociation:
    values: dict[str, Any] = {
        "spi": Spi(0xC0DE),
        "source": HERE,
        "destination": PEER,
        "direction": Direction.OUT,
        "mode": Mode.TUNNEL,
        "reqid": ReqId(7),
        "algorithm": EspAlgorithm(EncryptionId.AES_GCM_16, 128),
        "encryption_key": Secret(bytes(20)),
    }
    return SecurityAssociation(**{**values, **changes})


def carried(message: Message) -> Message:
    """As the other end of a netlink socket sees it."""
    (seen,) = decode(encode(message))
    return seen
