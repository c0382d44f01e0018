"""Labels in IP: MPLS-in-IP and MPLS-in-GRE (RFC 4023), MPLS-in-UDP (RFC 7510)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from kernel_shim.mpls.labels import Buffer
from kernel_shim.packet.checksum import checksum, partial_sum

UDP_PORT: Final = 6635  # RFC 7510 section 3
ETHERTYPE_UNICAST: Final = 0x8847
ETHERTYPE_UPSTREAM: Final = 0x8848  # RFC 5332

_GRE: Final = struct.Struct("!HH")
_UDP: Final = struct.Struct("!HHHH")
PLAIN_GRE: Final = _GRE.pack(0, ETHERTYPE_UNICAST)  # a header without options
_GRE_CHECKSUM: Final = 0x8000  # RFC 2784
_GRE_KEY: Final = 0x2000  # RFC 2890
_GRE_SEQUENCE: Final = 0x1000
_FIRST_EPHEMERAL: Final = 49152
_EPHEMERAL: Final = 16384


class Encapsulation(IntEnum):
    """The numbers are the IP protocols."""

    UDP = 17
    GRE = 47
    IP = 137

    @property
    def overhead(self) -> int:
        """Octets before the stack, without the IP header."""
        return {Encapsulation.UDP: _UDP.size, Encapsulation.GRE: _GRE.size, Encapsulation.IP: 0}[self]

    def header(self, length: int, flow: int = 0) -> bytes:
        """What stands before `length` octets of stack and payload.

        `flow` is a flow's hash: the UDP source port is made of it, for the balancing of those who see it. There is no UDP
        checksum (RFC 7510 section 3.1): ESP protects more than it would.
        """
        if self is Encapsulation.UDP:
            return _UDP.pack(_FIRST_EPHEMERAL + flow % _EPHEMERAL, UDP_PORT, _UDP.size + length, 0)
        if self is Encapsulation.GRE:
            return PLAIN_GRE
        return b""


class NotLabels(ValueError):
    """What stands before the labels is not a header of labels."""


def begin_of_stack(protocol: int, packet: Buffer, pseudo_header_sum: int | None = None) -> tuple[int, int]:
    """Where the stack in a packet of IP protocol `protocol` begins and where what it is in ends. Raises NotLabels.

    `packet` starts behind the IP header. A UDP checksum is verified when the sum of the pseudo header is given.
    """
    length = len(packet)
    if protocol == Encapsulation.IP:
        return 0, length
    if protocol == Encapsulation.GRE:
        return _begin_in_gre(packet), length
    if protocol != Encapsulation.UDP:
        raise NotLabels(f"IP protocol {protocol}")
    if length < _UDP.size:
        raise NotLabels("UDP header is cut off")
    _source, destination, told, sum_told = _UDP.unpack_from(packet)
    if destination != UDP_PORT:
        raise NotLabels(f"UDP port {destination}")
    if not _UDP.size <= told <= length:
        raise NotLabels("UDP length disagrees")
    if sum_told and pseudo_header_sum is not None and checksum(partial_sum(packet[:told]) + pseudo_header_sum):
        raise NotLabels("UDP checksum is wrong")
    return _UDP.size, told


def _begin_in_gre(packet: Buffer) -> int:
    if len(packet) < _GRE.size:
        raise NotLabels("GRE header is cut off")
    flags, ethertype = _GRE.unpack_from(packet)
    if flags & ~(_GRE_CHECKSUM | _GRE_KEY | _GRE_SEQUENCE):
        raise NotLabels("GRE flags or version")
    if ethertype not in (ETHERTYPE_UNICAST, ETHERTYPE_UPSTREAM):
        raise NotLabels(f"GRE protocol 0x{ethertype:04x}")
    begin = _GRE.size + 4 * sum(bool(flags & flag) for flag in (_GRE_CHECKSUM, _GRE_KEY, _GRE_SEQUENCE))
    if begin > len(packet):
        raise NotLabels("GRE header is cut off")
    if flags & _GRE_CHECKSUM and checksum(partial_sum(packet)):
        raise NotLabels("GRE checksum is wrong")
    return begin
