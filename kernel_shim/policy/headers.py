"""The slow path of flow keys: IPv4 options, fragments, ICMP, IPv6 extension headers (RFC 791, RFC 8200)."""

from __future__ import annotations

from typing import Final, NamedTuple

from kernel_shim.model import PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP
from kernel_shim.reasons import DropReason

# Specification.
HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
DESTINATION_OPTIONS: Final = 60
PROTOCOL_DCCP: Final = 33
PROTOCOL_SCTP: Final = 132
PROTOCOL_UDPLITE: Final = 136

# The protocols that begin with source and destination port, as Linux decodes a flow (net/xfrm/xfrm_policy.c).
PORT_PROTOCOLS: Final = frozenset({PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_DCCP, PROTOCOL_SCTP, PROTOCOL_UDPLITE})
_ICMP: Final = frozenset({PROTOCOL_ICMP, PROTOCOL_ICMPV6})
_EXTENSIONS: Final = frozenset({HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS})

# Ours.
MAX_EXTENSION_HEADERS: Final = 8  # RFC 8200 section 4.1 recommends at most seven, each once but for destination options


class Headers(NamedTuple):
    """What the headers of one packet say about its flow.

    `ports` are the 4 key bytes; None when this fragment does not carry them. `fragment` names the datagram of a
    fragment, apart from its addresses; None for a whole packet.
    """

    addresses: bytes
    protocol: int
    ports: bytes | None
    fragment: bytes | None = None
    first: bool = True


def read_headers(buffer: bytes | bytearray | memoryview, offset: int = 0) -> Headers | DropReason:
    """Read the packet that begins at `offset`; the buffer ends with it or later. Never raises."""
    if offset >= len(buffer):
        return DropReason.HEADER_TRUNCATED
    version = buffer[offset] >> 4
    if version == 4:
        return _read_v4(buffer, offset)
    if version == 6:
        return _read_v6(buffer, offset)
    return DropReason.NOT_IP


def _read_v4(buffer: bytes | bytearray | memoryview, offset: int) -> Headers | DropReason:
    available = len(buffer) - offset
    if available < 20:
        return DropReason.HEADER_TRUNCATED
    header = (buffer[offset] & 15) * 4
    total = buffer[offset + 2] << 8 | buffer[offset + 3]
    if header < 20 or total < header:
        return DropReason.HEADER_INVALID
    if total > available:
        return DropReason.HEADER_TRUNCATED
    flags = buffer[offset + 6] << 8 | buffer[offset + 7]
    protocol = buffer[offset + 9]
    addresses = bytes(buffer[offset + 12 : offset + 20])
    upper, end = offset + header, offset + total
    if not flags & 0x3FFF:
        ports = _ports(buffer, upper, end, protocol)
        return DropReason.HEADER_TRUNCATED if ports is None else Headers(addresses, protocol, ports)
    # RFC 791: source, destination, protocol and identification name the datagram.
    name = bytes((protocol, buffer[offset + 4], buffer[offset + 5]))
    if flags & 0x1FFF:
        return Headers(addresses, protocol, _ports_if_none(protocol), name, first=False)
    ports = _ports(buffer, upper, end, protocol)
    return DropReason.HEADER_TRUNCATED if ports is None else Headers(addresses, protocol, ports, name)


def _read_v6(buffer: bytes | bytearray | memoryview, offset: int) -> Headers | DropReason:
    available = len(buffer) - offset
    if available < 40:
        return DropReason.HEADER_TRUNCATED
    payload = buffer[offset + 4] << 8 | buffer[offset + 5]
    if payload > available - 40:
        return DropReason.HEADER_TRUNCATED
    addresses = bytes(buffer[offset + 8 : offset + 40])
    protocol, position, end = buffer[offset + 6], offset + 40, offset + 40 + payload
    fragment: bytes | None = None
    for _ in range(MAX_EXTENSION_HEADERS + 1):
        if protocol not in _EXTENSIONS:
            ports = _ports(buffer, position, end, protocol)
            return DropReason.HEADER_TRUNCATED if ports is None else Headers(addresses, protocol, ports, fragment)
        if position + 8 > end:
            return DropReason.HEADER_TRUNCATED
        following = buffer[position]
        if protocol == FRAGMENT:
            where = buffer[position + 2] << 8 | buffer[position + 3]
            name = bytes(buffer[position + 4 : position + 8])
            if where & 0xFFF8:
                hidden = following in _EXTENSIONS
                return Headers(addresses, following, None if hidden else _ports_if_none(following), name, first=False)
            # RFC 6946: a fragment header with offset 0 and no more to come is a whole packet.
            if where & 1:
                fragment = name
            position += 8
        else:
            position += 8 + buffer[position + 1] * 8
            if position > end:
                return DropReason.HEADER_TRUNCATED
        protocol = following
    return DropReason.EXTENSION_HEADERS_TOO_MANY


def _ports(buffer: bytes | bytearray | memoryview, upper: int, end: int, protocol: int) -> bytes | None:
    """The key bytes of the ports; None when the packet ends before them."""
    if protocol in PORT_PROTOCOLS:
        return bytes(buffer[upper : upper + 4]) if upper + 4 <= end else None
    if protocol in _ICMP:
        return bytes(buffer[upper : upper + 2]) * 2 if upper + 2 <= end else None
    return b"\0\0\0\0"


def _ports_if_none(protocol: int) -> bytes | None:
    """The key bytes of a protocol that has no ports; None when it has, and they are elsewhere."""
    return None if protocol in PORT_PROTOCOLS or protocol in _ICMP else b"\0\0\0\0"
