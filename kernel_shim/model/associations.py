"""Security associations, the entries of the SAD (RFC 4301 section 4.4.2): what a key manager asks for, and what a kernel knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, NewType

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.model.addresses import IPAddress
from kernel_shim.model.numbers import PORT_NAT_T, PROTOCOL_ESP
from kernel_shim.model.policies import Direction, Mode, ReqId
from kernel_shim.model.security_labels import NO_LABELS, Labels
from kernel_shim.model.selectors import NO_MARK, Mark, TrafficSelector
from kernel_shim.secret import NO_SECRET, Secret

Spi = NewType("Spi", int)
AcquireSequence = NewType("AcquireSequence", int)


class SaState(IntEnum):
    """The numbers are `SADB_SASTATE_*` (RFC 2367 section 2.3.1)."""

    LARVAL = 0
    MATURE = 1
    DYING = 2
    DEAD = 3


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A bound on an SA; 0 is no bound. `seconds` count from its addition."""

    seconds: int = 0
    octets: int = 0
    packets: int = 0


NO_LIFETIME: Final = Lifetime()


@dataclass(frozen=True, slots=True)
class UdpEncapsulation:
    """RFC 3948: the ports of the UDP header around ESP, in the SA's own direction."""

    source_port: int = PORT_NAT_T
    destination_port: int = PORT_NAT_T


@dataclass(frozen=True, slots=True)
class HeaderCopies:
    """Which fields of the inner and the outer IP header follow each other in tunnel mode (RFC 4301 section 5.1.2, RFC 6040).

    Without `ecn` the outer header says Not-ECT and is not looked at; without `df` the outer packet may travel in fragments.
    """

    dscp_out: bool = True  # from the inner header into the outer one
    dscp_in: bool = False  # and back
    ecn: bool = True
    df: bool = True


DEFAULT_COPIES: Final = HeaderCopies()
TFC_TO_MTU: Final = 0xFFFFFFFF  # a `tfc_padding` as long as the path allows


class SaId(NamedTuple):
    """What names an SA on the wire (RFC 4301 section 4.1)."""

    destination: IPAddress
    spi: Spi
    protocol: int = PROTOCOL_ESP


@dataclass(frozen=True, slots=True)
class SecurityAssociation:
    """One direction of a protected path, as the key manager asks for it.

    `direction` is IN or OUT as seen from this host. The encryption key carries its salt at the end.
    `source_selectors` and `destination_selectors` (the SA's own, RFC 4301 section 4.4.2.1) are in the SA's direction; a
    packet is covered when one of each side matches; empty means that the policy alone decides.
    `flags` of ESN and replay window as in RFC 4303; window 0 switches the replay check off.
    """

    spi: Spi
    source: IPAddress
    destination: IPAddress
    direction: Direction
    mode: Mode
    reqid: ReqId
    algorithm: EspAlgorithm
    encryption_key: Secret = NO_SECRET
    integrity_key: Secret = NO_SECRET
    encapsulation: UdpEncapsulation | None = None
    replay_window: int = 64
    esn: bool = False
    soft: Lifetime = NO_LIFETIME
    hard: Lifetime = NO_LIFETIME
    source_selectors: tuple[TrafficSelector, ...] = ()
    destination_selectors: tuple[TrafficSelector, ...] = ()
    acquire: AcquireSequence = AcquireSequence(0)  # the ACQUIRE or GETSPI that this SA answers
    if_id: int = 0  # the xfrm interface that its packets belong to; 0 is none
    mark: Mark = NO_MARK  # only packets with this mark find it
    set_mark: Mark = NO_MARK  # what its packets are marked with once they went through it
    labels: Labels = NO_LABELS
    copies: HeaderCopies = DEFAULT_COPIES
    tfc_padding: int = 0  # outbound tunnel packets are padded to this many bytes, as far as the path carries them (RFC 4303 section 2.7)
    offload: str = ""  # the device that encrypts (packets of another device are then encrypted by the kernel); empty is none

    @property
    def id(self) -> SaId:
        return SaId(self.destination, self.spi)


@dataclass(frozen=True, slots=True)
class SpiRequest:
    """GETSPI: reserve an inbound SPI for `source` to `destination`; the kernel chooses within `minimum` to `maximum`."""

    source: IPAddress
    destination: IPAddress
    mode: Mode
    reqid: ReqId
    minimum: int = 0x100
    maximum: int = 0xFFFFFFFF
    acquire: AcquireSequence = AcquireSequence(0)


@dataclass(frozen=True, slots=True)
class SaStatus:
    """What a kernel knows of an SA: the SA itself (keys only when the kernel gives them), its state and its use.

    `added` and `used` are seconds of the Unix epoch; `used` is None before the first packet.
    `sequence` is the last one sent (OUT) or the highest one received (IN).
    """

    sa: SecurityAssociation
    state: SaState
    octets: int = 0
    packets: int = 0
    added: float = 0.0
    used: float | None = None
    sequence: int = 0
