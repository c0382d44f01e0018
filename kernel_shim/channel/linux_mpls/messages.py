"""Routes of the label table and of VRFs as netlink has them (linux/rtnetlink.h, mpls_iptunnel.h): writing and reading.

Octets in the host's order, but for addresses and label stacks. Not pyroute2's classes: a table of 100,000 routes takes them 17 s.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from kernel_shim.mpls.labels import Entry, Label, MalformedStack, read_stack, write_stack
from kernel_shim.xfrm.structs import MalformedMessage
from kernel_shim.xfrm.wire import HEADER, frames

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_GETROUTE: Final = 26
NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_DUMP_INTR: Final = 0x010
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400

AF_INET: Final = 2
AF_INET6: Final = 10
AF_MPLS: Final = 28
RT_TABLE_UNSPEC: Final = 0  # the attribute tells the table
RT_TABLE_MAIN: Final = 254
RT_SCOPE_UNIVERSE: Final = 0
RT_SCOPE_NOWHERE: Final = 255  # of a route to delete: any
RTN_UNICAST: Final = 1
LWTUNNEL_ENCAP_MPLS: Final = 1

_DST, _OIF, _PRIORITY, _MULTIPATH, _TABLE, _NEWDST, _ENCAP_TYPE, _ENCAP, _TTL_PROPAGATE = 1, 4, 6, 9, 15, 19, 21, 22, 26  # RTA_*
_TUNNEL_DST, _TUNNEL_TTL = 1, 2  # MPLS_IPTUNNEL_*
_USUAL_METRIC: Final = 1024  # of an IPv6 route for which none is named; IPv6 deletes one of any metric, and of any type, else
_ADDRESS: Final = {AF_INET: 4, AF_INET6: 16}  # octets
_KIND: Final = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_ALIGNMENT: Final = 4

_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # family, lengths of destination and source, TOS, table, protocol, scope, type, flags
_NEXT_HOP: Final = struct.Struct("=HBBi")  # length, flags, hops, device
_ATTRIBUTE: Final = struct.Struct("=HH")
_HALF: Final = struct.Struct("=H")
_WORD: Final = struct.Struct("=I")
_NUMBER: Final = struct.Struct("=i")


class Way(NamedTuple):
    """`device` is an index. `ttl`: what labels on an IP packet have; 0 is the packet's own."""

    device: int
    labels: tuple[Label, ...] = ()
    ttl: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Of `family`. `destination`: an address, packed, of which `length` bits count; or, of AF_MPLS, a label in 4 octets.

    `hands_down`: of AF_MPLS, whether the TTL of a label that comes off is written into what comes to light.
    """

    family: int
    destination: bytes
    length: int
    table: int
    ways: tuple[Way, ...]
    hands_down: bool = False
    protocol: int = 0
    kind: int = RTN_UNICAST


class Answer(NamedTuple):
    """`error` is an errno, 0 of an acknowledgement; `done`: the dump ends. Neither with a `route`. `interrupted`: the table changed under the dump."""

    sequence: int
    route: Route | None = None
    error: int = 0
    done: bool = False
    interrupted: bool = False


# Writing


def label_destination(label: Label) -> bytes:
    return write_stack([Entry(label, 0, 0)])


def put_message(route: Route, sequence: int, *, replace: bool) -> bytes:
    flags = NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL)
    return _message(RTM_NEWROUTE, flags | NLM_F_ACK, sequence, _route(route, RT_SCOPE_UNIVERSE) + _ways(route))


def delete_message(route: Route, sequence: int) -> bytes:
    """Whatever way it leads."""
    metric = _attribute(_PRIORITY, _WORD.pack(_USUAL_METRIC)) if route.family == AF_INET6 else b""
    return _message(RTM_DELROUTE, NLM_F_ACK, sequence, _route(route, RT_SCOPE_NOWHERE if route.family == AF_INET else RT_SCOPE_UNIVERSE) + metric)


def dump_message(family: int, protocol: int, sequence: int, table: int = 0) -> bytes:
    """Unicast routes of that protocol; of one table, or of all. The rest is passed over by a socket that checks strictly."""
    body = _ROUTE.pack(family, 0, 0, 0, RT_TABLE_UNSPEC, protocol, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    return _message(RTM_GETROUTE, NLM_F_DUMP, sequence, body + (_attribute(_TABLE, _WORD.pack(table)) if table else b""))


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body


def _route(route: Route, scope: int) -> bytes:
    labels = route.family == AF_MPLS
    table = RT_TABLE_MAIN if labels else RT_TABLE_UNSPEC
    body = _ROUTE.pack(route.family, route.length, 0, 0, table, route.protocol, scope, route.kind, 0) + _attribute(_DST, route.destination)
    return body if labels else body + _attribute(_TABLE, _WORD.pack(route.table))


def _ways(route: Route) -> bytes:
    body = _attribute(_TTL_PROPAGATE, bytes((route.hands_down,))) if route.family == AF_MPLS else b""
    if len(route.ways) == 1:
        return body + _attribute(_OIF, _NUMBER.pack(route.ways[0].device)) + _labels(route.family, route.ways[0])
    hops = b""
    for way in route.ways:
        labels = _labels(route.family, way)
        hops += _NEXT_HOP.pack(_NEXT_HOP.size + len(labels), 0, 0, way.device) + labels
    return body + _attribute(_MULTIPATH, hops)


def _labels(family: int, way: Way) -> bytes:
    if not way.labels:
        return b""
    stack = write_stack([Entry(label, 0, 0) for label in way.labels])
    if family == AF_MPLS:
        return _attribute(_NEWDST, stack)
    around = _attribute(_TUNNEL_DST, stack) + (_attribute(_TUNNEL_TTL, bytes((way.ttl,))) if way.ttl else b"")
    return _attribute(_ENCAP_TYPE, _HALF.pack(LWTUNNEL_ENCAP_MPLS)) + _attribute(_ENCAP, around)


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % _ALIGNMENT)


# Reading


def answers(datagram: bytes) -> Iterator[Answer]:
    """The messages of a datagram. Errors as of `frames`."""
    for kind, flags, sequence, _, start, end in frames(datagram):
        begin = start + HEADER.size
        interrupted = bool(flags & NLM_F_DUMP_INTR)
        if kind in (NLMSG_ERROR, NLMSG_DONE):
            number = _NUMBER.unpack_from(datagram, begin)[0] if end - begin >= _NUMBER.size else 0
            yield Answer(sequence, error=max(-number, 0), done=kind == NLMSG_DONE, interrupted=interrupted)
        elif kind == RTM_NEWROUTE:
            yield Answer(sequence, _read_route(datagram, begin, end), interrupted=interrupted)


def _read_route(data: bytes, begin: int, end: int) -> Route:
    if end - begin < _ROUTE.size:
        raise MalformedMessage(f"a route of {end - begin} octets")
    family, length, _, _, table, protocol, _, kind, _ = _ROUTE.unpack_from(data, begin)
    found = dict(_read_attributes(data, begin + _ROUTE.size, end))
    if _TABLE in found:
        table = _read(_WORD, found[_TABLE])
    if _MULTIPATH in found:
        ways = tuple(_read_next_hops(family, found[_MULTIPATH]))
    else:
        ways = (_read_way(family, _read(_NUMBER, found[_OIF]), found),) if _OIF in found else ()
    destination = found.get(_DST, b"")
    size = _ADDRESS.get(family)
    if size is None:
        read_label(destination)
    elif not destination and not length:
        destination = bytes(size)  # of a default route none is told
    elif len(destination) != size or length > 8 * size:
        raise MalformedMessage(f"a destination of {len(destination)} octets, of which {length} bits count")
    return Route(family, destination, length, table, ways, found.get(_TTL_PROPAGATE, b"\0") != b"\0", protocol, kind)


def _read_next_hops(family: int, data: bytes) -> Iterator[Way]:
    at = 0
    while at < len(data):
        if len(data) - at < _NEXT_HOP.size:
            raise MalformedMessage("a next hop that is cut off")
        length, _, _, device = _NEXT_HOP.unpack_from(data, at)
        if not _NEXT_HOP.size <= length <= len(data) - at:
            raise MalformedMessage(f"a next hop of {length} octets")
        yield _read_way(family, device, dict(_read_attributes(data, at + _NEXT_HOP.size, at + length)))
        at += length + -length % _ALIGNMENT


def _read_way(family: int, device: int, attributes: dict[int, bytes]) -> Way:
    if family == AF_MPLS:
        return Way(device, _read_labels(attributes[_NEWDST])) if _NEWDST in attributes else Way(device)
    around = attributes.get(_ENCAP)
    if around is None or _read(_HALF, attributes.get(_ENCAP_TYPE, b"\0\0")) != LWTUNNEL_ENCAP_MPLS:
        return Way(device)
    found = dict(_read_attributes(around, 0, len(around)))
    return Way(device, _read_labels(found.get(_TUNNEL_DST, b"")), (found.get(_TUNNEL_TTL) or b"\0")[0])


def _read_labels(data: bytes) -> tuple[Label, ...]:
    try:
        return tuple(entry.label for entry in read_stack(data))
    except MalformedStack as error:
        raise MalformedMessage(str(error)) from None


def _read_attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    while end - at >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= end - at:
            raise MalformedMessage(f"an attribute of {length} octets in {end - at}")
        yield kind & _KIND, data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % _ALIGNMENT


def _read(number: struct.Struct, data: bytes) -> int:
    if len(data) < number.size:
        raise MalformedMessage(f"a number of {len(data)} octets")
    return int(number.unpack_from(data)[0])


def read_label(destination: bytes) -> Label:
    """MalformedMessage."""
    return _read_labels(destination)[0]
