"""The words that both packages use: selectors, policies, templates, security associations, and what a kernel reports.

All values are immutable. Addresses are `ipaddress` objects, ports and SPIs host integers, keys `Secret`,
times seconds. Terms are those of RFC 4301 and RFC 2367.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, summarize_address_range
from typing import Final, NamedTuple, NewType, Self

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.secret import NO_SECRET, Secret

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

Spi = NewType("Spi", int)
ReqId = NewType("ReqId", int)
PolicyIndex = NewType("PolicyIndex", int)
AcquireSequence = NewType("AcquireSequence", int)

ANY_PROTOCOL: Final = 0
PROTOCOL_ICMP: Final = 1
PROTOCOL_TCP: Final = 6
PROTOCOL_UDP: Final = 17
PROTOCOL_ESP: Final = 50
PROTOCOL_ICMPV6: Final = 58
PORT_IKE: Final = 500
PORT_NAT_T: Final = 4500
NO_PORT: Final = 0  # of an endpoint that sends ESP without UDP
SOCKET_MARK: Final = 0x49500000  # SO_MARK of IKE and ESP sockets: keeps their packets off the capture routes
ROUTE_PROTOCOL: Final = 178  # RTPROT_ of our routes and rules; unassigned in rtnetlink.h and /etc/iproute2/rt_protos


class KernelError(Exception):
    """A kernel refused a request. `errno` is what Linux would answer, `detail` says which field or entry."""

    def __init__(self, errno: int, detail: str) -> None:
        super().__init__(f"{detail} (errno {errno})")
        self.errno = errno
        self.detail = detail


class Endpoint(NamedTuple):
    """A UDP address; with port 0 the address alone, of ESP without UDP."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


class Direction(IntEnum):
    """The numbers are `IPSEC_DIR_*` of PF_KEY (linux/ipsec.h)."""

    IN = 1
    OUT = 2
    FORWARD = 3


class Mode(IntEnum):
    """The numbers are `IPSEC_MODE_*` of PF_KEY (linux/ipsec.h)."""

    TRANSPORT = 1
    TUNNEL = 2


class Action(IntEnum):
    """The numbers are `IPSEC_POLICY_*` of PF_KEY (linux/ipsec.h)."""

    DISCARD = 0
    BYPASS = 1
    PROTECT = 2


class Level(IntEnum):
    """How strictly a template asks for an SA; `IPSEC_LEVEL_*` of PF_KEY."""

    DEFAULT = 0
    USE = 1
    REQUIRE = 2
    UNIQUE = 3


class Unresolved(Enum):
    """What happens to a packet whose policy has no SA yet."""

    QUEUE = "queue"
    EAGAIN = "eagain"
    BLOCK = "block"
    DROP = "drop"


class SaState(IntEnum):
    """The numbers are `SADB_SASTATE_*` (RFC 2367 section 2.3.1)."""

    LARVAL = 0
    MATURE = 1
    DYING = 2
    DEAD = 3


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses `first` to `last`, both included, of one family."""

    first: IPAddress
    last: IPAddress

    def __post_init__(self) -> None:
        if self.first.version != self.last.version:
            raise ValueError(f"address range of two families: {self.first}-{self.last}")
        if int(self.first) > int(self.last):
            raise ValueError(f"address range ends before it begins: {self.first}-{self.last}")

    @classmethod
    def of(cls, network: IPNetwork) -> Self:
        return cls(network.network_address, network.broadcast_address)

    @classmethod
    def host(cls, address: IPAddress) -> Self:
        return cls(address, address)

    @classmethod
    def everything(cls, version: int) -> Self:
        return cls.of(IPv4Network("0.0.0.0/0") if version == 4 else IPv6Network("::/0"))

    @property
    def version(self) -> int:
        return self.first.version

    def prefixes(self) -> Iterator[IPNetwork]:
        """The fewest prefixes that cover exactly this range, ascending."""
        return summarize_address_range(self.first, self.last)

    def contains(self, other: AddressRange) -> bool:
        return self.version == other.version and int(self.first) <= int(other.first) and int(other.last) <= int(self.last)

    def intersection(self, other: AddressRange) -> AddressRange | None:
        if self.version != other.version:
            return None
        first, last = max(self.first, other.first, key=int), min(self.last, other.last, key=int)
        return AddressRange(first, last) if int(first) <= int(last) else None

    def __contains__(self, address: IPAddress) -> bool:
        return address.version == self.version and int(self.first) <= int(address) <= int(self.last)

    def __str__(self) -> str:
        networks = list(self.prefixes())
        return str(networks[0]) if len(networks) == 1 else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports `low` to `high`, both included. For ICMP and ICMPv6 a port is `type << 8 | code`, on both sides (RFC 7296 section 3.13.1)."""

    low: int = 0
    high: int = 65535

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 65535:
            raise ValueError(f"not a port range: {self.low}-{self.high}")

    @property
    def any(self) -> bool:
        return self.low == 0 and self.high == 65535

    def contains(self, other: PortRange) -> bool:
        return self.low <= other.low and other.high <= self.high

    def intersection(self, other: PortRange) -> PortRange | None:
        low, high = max(self.low, other.low), min(self.high, other.high)
        return PortRange(low, high) if low <= high else None

    def __contains__(self, port: int) -> bool:
        return self.low <= port <= self.high


ANY_PORT: Final = PortRange()


@dataclass(frozen=True, slots=True)
class TrafficSelector:
    """One side of a flow: addresses, protocol (0 is any) and ports."""

    addresses: AddressRange
    protocol: int = ANY_PROTOCOL
    ports: PortRange = ANY_PORT

    def contains(self, other: TrafficSelector) -> bool:
        return self.addresses.contains(other.addresses) and self.protocol in (ANY_PROTOCOL, other.protocol) and self.ports.contains(other.ports)

    def intersection(self, other: TrafficSelector) -> TrafficSelector | None:
        """RFC 7296 section 2.9: what narrowing yields; None when the two share no packet."""
        addresses, ports = self.addresses.intersection(other.addresses), self.ports.intersection(other.ports)
        if addresses is None or ports is None or (self.protocol != other.protocol and ANY_PROTOCOL not in (self.protocol, other.protocol)):
            return None
        return TrafficSelector(addresses, self.protocol or other.protocol, ports)

    def __str__(self) -> str:
        """As swanctl writes it: `10.0.0.0/24[tcp/80]`."""
        if self.protocol == ANY_PROTOCOL and self.ports.any:
            return str(self.addresses)
        names = {PROTOCOL_ICMP: "icmp", PROTOCOL_TCP: "tcp", PROTOCOL_UDP: "udp", PROTOCOL_ICMPV6: "ipv6-icmp"}
        protocol = names.get(self.protocol, str(self.protocol) if self.protocol else "")
        if self.ports.any:
            return f"{self.addresses}[{protocol}]"
        ports = str(self.ports.low) if self.ports.low == self.ports.high else f"{self.ports.low}-{self.ports.high}"
        return f"{self.addresses}[{protocol}/{ports}]"


@dataclass(frozen=True, slots=True)
class Mark:
    """A packet matches when `packet mark & mask == value`."""

    value: int = 0
    mask: int = 0


NO_MARK: Final = Mark()


@dataclass(frozen=True, slots=True)
class Selector:
    """Which packets a policy is for, in the direction in which they travel."""

    source: AddressRange
    destination: AddressRange
    protocol: int = ANY_PROTOCOL
    source_ports: PortRange = ANY_PORT
    destination_ports: PortRange = ANY_PORT
    if_id: int = 0
    mark: Mark = NO_MARK

    def __post_init__(self) -> None:
        if self.source.version != self.destination.version:
            raise ValueError("selector of two address families")

    @classmethod
    def between(cls, source: TrafficSelector, destination: TrafficSelector) -> Self:
        """The selector of traffic from `source` to `destination`. Raises ValueError when they share no protocol or family."""
        if source.protocol != destination.protocol and ANY_PROTOCOL not in (source.protocol, destination.protocol):
            raise ValueError(f"selectors of two protocols: {source} and {destination}")
        return cls(source.addresses, destination.addresses, source.protocol or destination.protocol, source.ports, destination.ports)

    def reversed(self) -> Selector:
        return Selector(self.destination, self.source, self.protocol, self.destination_ports, self.source_ports, self.if_id, self.mark)

    @property
    def version(self) -> int:
        return self.source.version

    def __str__(self) -> str:
        source = TrafficSelector(self.source, self.protocol, self.source_ports)
        destination = TrafficSelector(self.destination, self.protocol, self.destination_ports)
        return f"{source} => {destination}"


@dataclass(frozen=True, slots=True)
class Flow:
    """The selectors of one packet. For ICMP both ports are `type << 8 | code`; for a protocol without ports both are 0."""

    source: IPAddress
    destination: IPAddress
    protocol: int
    source_port: int = 0
    destination_port: int = 0

    def __str__(self) -> str:
        return f"{self.source}[{self.source_port}] => {self.destination}[{self.destination_port}] proto {self.protocol}"


@dataclass(frozen=True, slots=True)
class Template:
    """The SA that a policy asks for. `source` and `destination` are the outer addresses; None is any."""

    mode: Mode
    reqid: ReqId
    source: IPAddress | None = None
    destination: IPAddress | None = None
    protocol: int = PROTOCOL_ESP
    level: Level = Level.UNIQUE


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one end of an SA is (RFC 2367 section 2.3.5). Of no meaning to a kernel, which gives it back."""

    type: int
    name: bytes = b""
    id: int = 0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A sensitivity label (RFC 2367 section 2.3.6); bitmaps are whole words of 8 octets. Given back, and nothing else."""

    domain: int
    level: int = 0
    compartments: bytes = b""
    integrity_level: int = 0
    integrity_compartments: bytes = b""


@dataclass(frozen=True, slots=True)
class SecurityContext:
    """What a Linux security module calls an SA or a policy (struct sadb_x_sec_ctx). Given back, and nothing else."""

    algorithm: int
    domain: int
    context: bytes


@dataclass(frozen=True, slots=True)
class Labels:
    """What a key manager hangs on an SA for others to read."""

    source: Identity | None = None
    destination: Identity | None = None
    sensitivity: Sensitivity | None = None
    context: SecurityContext | None = None


NO_LABELS: Final = Labels()


@dataclass(frozen=True, slots=True)
class Policy:
    """An entry of the SPD. A lower `priority` wins, as in Linux; of two equal ones the older. `index` is the kernel's, 0 before it gave one.

    After `soft_seconds` the kernel says so, after `hard_seconds` the policy is gone; both count from when it was put there, 0 is never.
    """

    selector: Selector
    direction: Direction
    action: Action
    priority: int = 0
    templates: tuple[Template, ...] = ()
    unresolved: Unresolved = Unresolved.QUEUE
    index: PolicyIndex = PolicyIndex(0)
    soft_seconds: int = 0
    hard_seconds: int = 0
    context: SecurityContext | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A tunnel whose outer addresses change. `reqid` 0 is any."""

    mode: Mode
    reqid: ReqId
    old_source: IPAddress
    old_destination: IPAddress
    new_source: IPAddress
    new_destination: IPAddress


@dataclass(frozen=True, slots=True)
class Migration:
    """A policy, its templates and the SAs behind them go to other outer addresses (SADB_X_MIGRATE)."""

    direction: Direction
    selector: Selector
    moves: tuple[Move, ...]


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


# What a kernel reports of its own accord.


@dataclass(frozen=True, slots=True)
class Acquire:
    """A packet needs an SA that does not exist. `flow` is None on kernels that cannot say it."""

    sequence: AcquireSequence
    policy: PolicyIndex
    reqid: ReqId
    mode: Mode
    source: IPAddress | None
    destination: IPAddress | None
    selector: Selector | None = None
    flow: Flow | None = None


@dataclass(frozen=True, slots=True)
class Expire:
    """An SA reached a lifetime. After a hard one it is gone."""

    sa: SaId
    reqid: ReqId
    hard: bool


@dataclass(frozen=True, slots=True)
class NewMapping:
    """An authenticated ESP packet of an inbound SA came from another UDP address than before (RFC 3948 section 4)."""

    sa: SaId
    reqid: ReqId
    old: Endpoint
    new: Endpoint


@dataclass(frozen=True, slots=True)
class PolicyExpire:
    """A policy reached a lifetime. After a hard one it is gone."""

    policy: Policy
    hard: bool


KernelEvent = Acquire | Expire | NewMapping | PolicyExpire


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kernel can do; it bounds what a key manager proposes, narrows and accepts."""

    name: str
    algorithms: frozenset[EspAlgorithm]
    modes: frozenset[Mode] = field(default_factory=lambda: frozenset(Mode))
    encapsulation_required: bool = False  # ESP only in UDP
    encapsulation_preferred: bool = False  # ESP in UDP is a good deal faster
    esn: bool = True
    maximum_replay_window: int = 4096
    port_ranges: bool = True
    address_ranges: bool = True
    sa_selectors: bool = True
    acquire_flow: bool = True
    unresolved_modes: frozenset[Unresolved] = frozenset({Unresolved.QUEUE})
    tfc_padding: bool = False  # it pads, and takes padding away
    header_copies: bool = True  # each SA has `HeaderCopies` of its own
    labels: bool = False  # it forwards MPLS
    labels_in_full: bool = True  # and all of what is configured of it; else as much as Linux does
    if_ids: bool = False  # policies and SAs of one xfrm interface
    marks: bool = False
    offload: bool = False
    maximum_reqid: int = 0x7FFFFFFF
    binds_ike_sockets: bool = False  # the kernel opens the IKE sockets and hands their descriptors over
