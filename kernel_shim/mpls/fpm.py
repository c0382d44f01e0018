"""The forwarding plane manager's protocol: what FRR's zebra says through `-M dplane_fpm_nl` (FRR: fpm/fpm.h, zebra/dplane_fpm_nl.c).

Each frame is a header (version, type, length in network byte order, itself included) and netlink messages in host byte order (linux/rtnetlink.h,
linux/nexthop.h): routes of IPv4, IPv6 and labels (address family 28), and next hops that routes refer to by number. A route that is replaced
is two messages in one frame: it went, and it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from struct import Struct
from typing import Final

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.labels import Label, MalformedStack, read_stack

# Specifications
VERSION: Final = 1
TYPE_NETLINK: Final = 1
AF_INET: Final = 2
AF_INET6: Final = 10
AF_MPLS: Final = 28
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_NEWNEXTHOP: Final = 104
RTM_DELNEXTHOP: Final = 105
RTN_UNICAST: Final = 1
RTA_DST: Final = 1
RTA_OIF: Final = 4
RTA_GATEWAY: Final = 5
RTA_MULTIPATH: Final = 9
RTA_TABLE: Final = 15
RTA_VIA: Final = 18
RTA_NEWDST: Final = 19
RTA_ENCAP_TYPE: Final = 21
RTA_ENCAP: Final = 22
RTA_NH_ID: Final = 30
NHA_ID: Final = 1
NHA_GROUP: Final = 2
NHA_BLACKHOLE: Final = 4
NHA_OIF: Final = 5
NHA_GATEWAY: Final = 6
NHA_ENCAP_TYPE: Final = 7
NHA_ENCAP: Final = 8
LWTUNNEL_ENCAP_MPLS: Final = 1
MPLS_IPTUNNEL_DST: Final = 1
NLA_TYPE_MASK: Final = 0x3FFF

# Limits of this implementation
MAX_HOPS: Final = 64  # of one route or group

_FRAME: Final = Struct("!BBH")
_NETLINK: Final = Struct("=IHHII")
_ROUTE: Final = Struct("=BBBBBBBBI")  # family, destination and source length, TOS, table, protocol, scope, type, flags
_NEXTHOP: Final = Struct("=BBBxI")  # family, scope, protocol, flags
_ATTRIBUTE: Final = Struct("=HH")
_HOP: Final = Struct("=HBBi")  # length, flags, weight less one, interface
_GROUP: Final = Struct("=IBBH")
_WORD: Final = Struct("=I")
_SHORT: Final = Struct("=H")


class FpmError(ValueError):
    """The peer does not speak FPM, or says something that cannot be read: close the connection and let it begin anew."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One way of a route: `labels` go on, outermost first. `interface` is an index of the host, 0 when none is said."""

    gateway: IPAddress | None = None
    interface: int = 0
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, slots=True)
class RouteChange:
    """A route of table `table` came, or went (no hops and no `group`). `group` names a next hop that is told apart from it; 0 is none."""

    table: int
    prefix: IPNetwork
    hops: tuple[Hop, ...] = ()
    group: int = 0
    gone: bool = False


@dataclass(frozen=True, slots=True)
class LabelChange:
    """What happens to packets with `label` on top came, or went."""

    label: Label
    hops: tuple[Hop, ...] = ()
    group: int = 0
    gone: bool = False


@dataclass(frozen=True, slots=True)
class GroupChange:
    """A numbered next hop came, or went: one hop, or the numbers of others."""

    number: int
    hop: Hop | None = None
    members: tuple[int, ...] = ()
    gone: bool = False


FpmChange = RouteChange | LabelChange | GroupChange


class FpmDecoder:
    """Frames may come in any pieces. At most one frame is kept."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def amid(self) -> bool:
        """A frame has begun that is not complete."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[FpmChange]:
        """What `data` completes. Raises FpmError; the decoder is then of no more use."""
        data = self._rest + data
        changes: list[FpmChange] = []
        at = 0
        while at + _FRAME.size <= len(data):
            version, kind, length = _FRAME.unpack_from(data, at)
            if version != VERSION or length < _FRAME.size:
                raise FpmError(f"frame of version {version} with length {length}")
            if at + length > len(data):
                break
            if kind == TYPE_NETLINK:
                changes += decode_messages(data[at + _FRAME.size : at + length])
            at += length
        self._rest = data[at:]
        return changes


def decode_messages(data: bytes) -> Iterator[FpmChange]:
    """One netlink message or more, without those that are of no concern to forwarding. Raises FpmError."""
    at = 0
    while at < len(data) or not data:
        if len(data) - at < _NETLINK.size:
            raise FpmError("netlink header is cut off")
        length, kind, _flags, _sequence, _port = _NETLINK.unpack_from(data, at)
        if not _NETLINK.size <= length <= len(data) - at:
            raise FpmError(f"netlink length {length}")
        change = _change(kind, data[at + _NETLINK.size : at + length])
        if change is not None:
            yield change
        at += _aligned(length)


def _change(kind: int, body: bytes) -> FpmChange | None:
    if kind in (RTM_NEWROUTE, RTM_DELROUTE):
        return _route(body, gone=kind == RTM_DELROUTE)
    if kind in (RTM_NEWNEXTHOP, RTM_DELNEXTHOP):
        return _group(body, gone=kind == RTM_DELNEXTHOP)
    return None


def _route(body: bytes, *, gone: bool) -> RouteChange | LabelChange | None:
    if len(body) < _ROUTE.size:
        raise FpmError("route is cut off")
    family, length, _source, _tos, table, _protocol, _scope, kind, _flags = _ROUTE.unpack_from(body)
    attributes = _attributes(body[_ROUTE.size :])
    if family not in (AF_INET, AF_INET6, AF_MPLS) or (not gone and kind != RTN_UNICAST):
        return None
    hops = () if gone else _hops(attributes)
    group = 0 if gone else _word(attributes, RTA_NH_ID)
    if family == AF_MPLS:
        (label,) = _labels(attributes.get(RTA_DST, b""), single=True)
        return LabelChange(label, hops, group, gone)
    return RouteChange(_word(attributes, RTA_TABLE) or table, _prefix(family, attributes.get(RTA_DST, b""), length), hops, group, gone)


def _group(body: bytes, *, gone: bool) -> GroupChange | None:
    if len(body) < _NEXTHOP.size:
        raise FpmError("next hop is cut off")
    attributes = _attributes(body[_NEXTHOP.size :])
    number = _word(attributes, NHA_ID)
    if gone:
        return GroupChange(number, gone=True)
    if NHA_GROUP in attributes:
        group = attributes[NHA_GROUP]
        if len(group) % _GROUP.size or len(group) > MAX_HOPS * _GROUP.size:
            raise FpmError(f"next-hop group of {len(group)} octets")
        return GroupChange(number, members=tuple(member for member, *_ in _GROUP.iter_unpack(group)))
    if NHA_BLACKHOLE in attributes:
        return GroupChange(number)
    gateway = _address(attributes[NHA_GATEWAY]) if NHA_GATEWAY in attributes else None
    labels = _encapsulated(attributes, NHA_ENCAP_TYPE, NHA_ENCAP)
    return GroupChange(number, Hop(gateway, _word(attributes, NHA_OIF), labels))


def _hops(attributes: Mapping[int, bytes]) -> tuple[Hop, ...]:
    if RTA_MULTIPATH not in attributes:
        hop = _hop(attributes, _word(attributes, RTA_OIF))
        return (hop,) if hop != Hop() else ()
    data, hops = attributes[RTA_MULTIPATH], list[Hop]()
    while data:
        if len(data) < _HOP.size:
            raise FpmError("next hop of a route is cut off")
        length, _flags, _weight, interface = _HOP.unpack_from(data)
        if not _HOP.size <= length <= len(data) or len(hops) == MAX_HOPS:
            raise FpmError(f"{len(hops) + 1} next hops, one of {length} octets")
        hops.append(_hop(_attributes(data[_HOP.size : length]), interface))
        data = data[_aligned(length) :]
    return tuple(hops)


def _hop(attributes: Mapping[int, bytes], interface: int) -> Hop:
    gateway = None
    if RTA_VIA in attributes:
        via = attributes[RTA_VIA]
        if len(via) < _SHORT.size:
            raise FpmError("via is cut off")
        gateway = _address(via[_SHORT.size :][: 4 if _SHORT.unpack_from(via)[0] == AF_INET else 16])
    elif RTA_GATEWAY in attributes:
        gateway = _address(attributes[RTA_GATEWAY])
    labels = _labels(attributes[RTA_NEWDST]) if RTA_NEWDST in attributes else _encapsulated(attributes, RTA_ENCAP_TYPE, RTA_ENCAP)
    return Hop(gateway, interface, labels)


def _encapsulated(attributes: Mapping[int, bytes], kind: int, value: int) -> tuple[Label, ...]:
    told = attributes.get(kind)
    if told is None or value not in attributes:
        return ()
    if len(told) < _SHORT.size or _SHORT.unpack_from(told)[0] != LWTUNNEL_ENCAP_MPLS:
        return ()
    nested = _attributes(attributes[value])
    return _labels(nested[MPLS_IPTUNNEL_DST]) if MPLS_IPTUNNEL_DST in nested else ()


def _labels(data: bytes, *, single: bool = False) -> tuple[Label, ...]:
    try:
        entries = read_stack(data)
    except MalformedStack as error:
        raise FpmError(f"labels: {error}") from None
    if single and len(entries) != 1:
        raise FpmError(f"a route of {len(entries)} labels")
    return tuple(entry.label for entry in entries)


def _prefix(family: int, data: bytes, length: int) -> IPNetwork:
    size = 4 if family == AF_INET else 16
    if length > size * 8 or len(data) not in (0, size):
        raise FpmError(f"destination of {len(data)} octets and {length} bits")
    number = int.from_bytes(data.ljust(size, b"\0"), "big") >> (size * 8 - length) << (size * 8 - length)
    return IPv4Network((number, length)) if family == AF_INET else IPv6Network((number, length))


def _address(data: bytes) -> IPAddress:
    """bgpd's IPv6 routes of an IPv4 next hop have it as ::ffff:a.b.c.d (RFC 4659 section 3.2.1.2)."""
    if len(data) == 4:
        return IPv4Address(data)
    if len(data) == 16:
        address = IPv6Address(data)
        return address.ipv4_mapped or address
    raise FpmError(f"address of {len(data)} octets")


def _word(attributes: Mapping[int, bytes], kind: int) -> int:
    data = attributes.get(kind)
    if data is None:
        return 0
    if len(data) != _WORD.size:
        raise FpmError(f"attribute {kind} of {len(data)} octets")
    return int(_WORD.unpack(data)[0])


def _attributes(data: bytes) -> dict[int, bytes]:
    return dict(_each_attribute(data))


def _each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise FpmError(f"attribute {kind & NLA_TYPE_MASK} of {length} octets")
        yield kind & NLA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
