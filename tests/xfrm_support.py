"""An SA between two gateways, and its way through a netlink socket."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Any, Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.model import AcquireSequence, Direction, Mode, ReqId, SaState, SaStatus, SecurityAssociation, Spi
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


def is_gone(sequence: AcquireSequence, standing: Iterable[SaStatus]) -> bool:
    """Whether the larval SA of that ACQUIRE went and left none behind.

    The packet that waited for it asks anew by itself, from 100 ms after it came on (net/xfrm/xfrm_policy.c, XFRM_QUEUE_TMO_MIN): what it asks for may stand.
    """
    return all(it.state is SaState.LARVAL and it.sa.spi == 0 and it.sa.acquire not in (0, sequence) for it in standing)
