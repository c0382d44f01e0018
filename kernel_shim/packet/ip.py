"""IPv4 and IPv6 headers: where things are, and whether the packet is whole."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from kernel_shim.model import IPAddress
from kernel_shim.packet.checksum import checksum, partial_sum

Buffer = bytes | bytearray | memoryview

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
LARGEST_PACKET: Final = 65535  # octets that the total length of IPv4 can say, and no larger IPv6 packet is made or taken
IPV6_SMALLEST_MTU: Final = 1280  # RFC 8200 section 5: every path carries this
UDP_HEADER: Final = 8
PROTOCOL_IPIP: Final = 4
PROTOCOL_IPV6: Final = 41
PROTOCOL_TCP: Final = 6
PROTOCOL_UDP: Final = 17
PROTOCOL_ICMP: Final = 1
PROTOCOL_ICMPV6: Final = 58
NO_NEXT_HEADER: Final = 59

HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
AUTHENTICATION: Final = 51
DESTINATION_OPTIONS: Final = 60

# Limits of this implementation
EXTENSION_HEADERS: Final = 8  # more than that in one packet is not read any further

_TTL: Final = 64  # what a rebuilt header starts with (RFC 1700)


class Malformed(ValueError):
    """Not a whole IP packet."""


class Layout(NamedTuple):
    """What a packet's headers say. `upper` is the offset of the upper-layer header, `protocol` its number.

    `length` is the packet's own; bytes behind it are padding. `dont_fragment` is always true of IPv6.
    `fragment_offset` and `more_fragments` are 0 and False in a whole datagram.
    """

    version: int
    length: int
    protocol: int
    upper: int
    dont_fragment: bool
    fragment_offset: int
    more_fragments: bool

    @property
    def fragment(self) -> bool:
        return self.more_fragments or self.fragment_offset != 0


def layout(packet: Buffer) -> Layout:
    """Read the IP header of `packet`. Raises Malformed."""
    if len(packet) < IPV4_HEADER:
        raise Malformed("shorter than an IP header")
    version = packet[0] >> 4
    if version == 4:
        upper = (packet[0] & 15) << 2
        length = packet[2] << 8 | packet[3]
        if upper < IPV4_HEADER or length < upper or length > len(packet):
            raise Malformed("IPv4 lengths disagree")
        flags = packet[6] << 8 | packet[7]
        return Layout(4, length, packet[9], upper, bool(flags & 0x4000), (flags & 0x1FFF) << 3, bool(flags & 0x2000))
    if version == 6:
        return _layout6(packet)
    raise Malformed("neither IPv4 nor IPv6")


def fragmented(packet: Buffer) -> bool:
    """Whether a whole packet's header is that of a fragment; of a packet that is not whole, either."""
    if packet[0] >> 4 == 4:
        return bool((packet[6] << 8 | packet[7]) & 0x3FFF)
    if packet[6] not in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, FRAGMENT):
        return False
    try:
        return layout(packet).fragment
    except Malformed:
        return False


def _layout6(packet: Buffer) -> Layout:
    if len(packet) < IPV6_HEADER:
        raise Malformed("shorter than an IPv6 header")
    length = IPV6_HEADER + (packet[4] << 8 | packet[5])
    if length > len(packet):
        raise Malformed("IPv6 payload is cut off")
    protocol, upper, offset, more = packet[6], IPV6_HEADER, 0, False
    for _ in range(EXTENSION_HEADERS):
        if protocol not in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, FRAGMENT, AUTHENTICATION) or offset:
            break
        if upper + 8 > length:
            raise Malformed("IPv6 extension header is cut off")
        following, size = packet[upper], packet[upper + 1]
        if protocol == FRAGMENT:
            word = packet[upper + 2] << 8 | packet[upper + 3]
            offset, more = word & 0xFFF8, bool(word & 1)
            upper += 8
        elif protocol == AUTHENTICATION:
            upper += (size + 2) << 2  # RFC 4302 section 2.2 counts words of 32 bits
        else:
            upper += (size + 1) << 3
        if upper > length:
            raise Malformed("IPv6 extension header is cut off")
        protocol = following
    return Layout(6, length, protocol, upper, True, offset, more)


def source(packet: Buffer) -> IPAddress:
    return IPv4Address(bytes(packet[12:16])) if packet[0] >> 4 == 4 else IPv6Address(bytes(packet[8:24]))


def destination(packet: Buffer) -> IPAddress:
    return IPv4Address(bytes(packet[16:20])) if packet[0] >> 4 == 4 else IPv6Address(bytes(packet[24:40]))


def address_bytes(packet: Buffer) -> Buffer:
    """Source and destination side by side, as the pseudo header wants them."""
    return packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]


def build_header(version: int, source: bytes, destination: bytes, protocol: int, payload: int, ttl: int = _TTL, traffic_class: int = 0) -> bytes:
    """A plain header, without options, for `payload` bytes. IPv4 with DF set and id 0 (RFC 6864 section 4)."""
    if version == 6:
        return struct.pack("!IHBB", 6 << 28 | traffic_class << 20, payload, protocol, ttl) + source + destination
    header = bytearray(struct.pack("!BBHHHBBH", 0x45, traffic_class, IPV4_HEADER + payload, 0, 0x4000, ttl, protocol, 0) + source + destination)
    refresh_header_checksum(header)
    return bytes(header)


def refresh_header_checksum(packet: bytearray | memoryview) -> None:
    """Recompute the checksum of the IPv4 header at the start of `packet`."""
    packet[10:12] = b"\0\0"
    packet[10:12] = checksum(partial_sum(packet[: (packet[0] & 15) << 2])).to_bytes(2, "little")


def decrement_ttl(packet: bytearray | memoryview) -> bool:
    """One hop less (RFC 1812 section 5.3.1, RFC 8200 section 3); False when none was left, and the packet is then unchanged."""
    if packet[0] >> 4 == 6:
        if packet[7] <= 1:
            return False
        packet[7] -= 1
        return True
    if packet[8] <= 1:
        return False
    packet[8] -= 1
    # RFC 1624: adjusted, not recomputed, so that a header damaged before stays visibly damaged.
    adjusted = (packet[10] << 8 | packet[11]) + 0x0100
    adjusted += adjusted >= 0xFFFF
    packet[10], packet[11] = adjusted >> 8 & 0xFF, adjusted & 0xFF
    return True
