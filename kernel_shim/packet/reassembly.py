"""Joining fragments into the datagram that they came from (RFC 791 section 3.2, RFC 8200 section 4.5).

Transport mode ESP takes whole datagrams only (RFC 4303 section 3.1.1), and a host cuts its packets before it hands them to a TUN.
"""

from __future__ import annotations

from typing import Final

from kernel_shim.packet.ip import (
    DESTINATION_OPTIONS,
    FRAGMENT,
    HOP_BY_HOP,
    IPV6_HEADER,
    LARGEST_PACKET,
    ROUTING,
    Buffer,
    Layout,
    address_bytes,
    refresh_header_checksum,
)

# Specifications
_UNFRAGMENTABLE: Final = frozenset({HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS})  # RFC 8200 section 4.5: what may stand before the fragment header

# Limits of this implementation
REASSEMBLY_SECONDS: Final = 30.0  # as long as Linux waits (net.ipv4.ipfrag_time)
MAX_DATAGRAMS_APART: Final = 256
MAX_OCTETS_APART: Final = 4 << 20  # as net.ipv4.ipfrag_high_thresh of Linux


class _Datagram:
    __slots__ = ("deadline", "head", "octets", "pieces", "total")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.head = b""  # what stands before the payload, once the first fragment came
        self.pieces: dict[int, bytes] = {}  # offset -> payload
        self.octets = 0
        self.total = -1  # bytes of payload, once the last fragment came


class Reassembler:
    """Datagrams by name, the oldest first. Those that overlap themselves are thrown away (RFC 5722)."""

    def __init__(self) -> None:
        self._datagrams: dict[bytes, _Datagram] = {}
        self._octets = 0
        self.lost = 0  # fragments thrown away since somebody last looked

    def __len__(self) -> int:
        return len(self._datagrams)

    @property
    def octets(self) -> int:
        """Bytes that are kept."""
        return self._octets

    def take(self, packet: Buffer, parsed: Layout, now: float) -> bytearray | None:
        """The whole datagram when this fragment was the last that missed. `parsed` is the layout of `packet`, which is a fragment."""
        self.expire(now)
        header = parsed.upper if parsed.version == 4 else _fragment_header(packet, parsed)
        if header is None:
            self.lost += 1
            return None
        begin = header if parsed.version == 4 else header + 8
        identification = bytes(packet[4:6]) + bytes(packet[9:10]) if parsed.version == 4 else bytes(packet[header + 4 : header + 8])
        name = bytes(address_bytes(packet)) + identification
        datagram = self._datagrams.get(name)
        if datagram is None:
            datagram = self._datagrams[name] = _Datagram(now + REASSEMBLY_SECONDS)
        piece, offset = bytes(packet[begin : parsed.length]), parsed.fragment_offset
        if not self._fits(datagram, offset, len(piece), parsed.more_fragments):
            self._drop(name)
            self.lost += 1
            return None
        datagram.pieces[offset] = piece
        datagram.octets += len(piece)
        self._octets += len(piece)
        if not parsed.more_fragments:
            datagram.total = offset + len(piece)
        if offset == 0:
            datagram.head = _plain_head(packet, header, parsed.version)
        if datagram.octets == datagram.total and datagram.head:
            self._forget(name)
            return _join(datagram, parsed.version)
        while len(self._datagrams) > MAX_DATAGRAMS_APART or self._octets > MAX_OCTETS_APART:
            self._drop(next(iter(self._datagrams)))
        return None

    def expire(self, now: float) -> None:
        while self._datagrams and next(iter(self._datagrams.values())).deadline <= now:
            self._drop(next(iter(self._datagrams)))

    def _fits(self, datagram: _Datagram, offset: int, length: int, more: bool) -> bool:
        end = offset + length
        if not length or end > LARGEST_PACKET or (more and length % 8) or (not more and datagram.total >= 0):
            return False
        if datagram.total >= 0 and end > datagram.total:
            return False
        return all(end <= begin or begin + len(piece) <= offset for begin, piece in datagram.pieces.items()) and (
            more or all(begin < offset for begin in datagram.pieces)
        )

    def _drop(self, name: bytes) -> None:
        self.lost += len(self._forget(name).pieces)

    def _forget(self, name: bytes) -> _Datagram:
        datagram = self._datagrams.pop(name)
        self._octets -= datagram.octets
        return datagram


def _fragment_header(packet: Buffer, parsed: Layout) -> int | None:
    """Where the fragment header of an IPv6 packet stands."""
    kind, position = packet[6], IPV6_HEADER
    while kind in _UNFRAGMENTABLE and position + 8 <= parsed.length:
        kind, position = packet[position], position + ((packet[position + 1] + 1) << 3)
    return position if kind == FRAGMENT and position + 8 <= parsed.length else None


def _plain_head(packet: Buffer, header: int, version: int) -> bytes:
    """The headers without what says that it is a fragment."""
    head = bytearray(packet[:header])
    if version == 4:
        head[6:8] = b"\0\0"
        return bytes(head)
    before, position = 6, IPV6_HEADER
    while position < header:
        before, position = position, position + ((head[position + 1] + 1) << 3)
    head[before] = packet[header]
    return bytes(head)


def _join(datagram: _Datagram, version: int) -> bytearray | None:
    whole = bytearray(datagram.head)
    for _, piece in sorted(datagram.pieces.items()):
        whole += piece
    if len(whole) > LARGEST_PACKET:
        return None  # a first header longer than those of the other fragments
    if version == 4:
        whole[2:4] = len(whole).to_bytes(2, "big")
        refresh_header_checksum(whole)
    else:
        whole[4:6] = (len(whole) - IPV6_HEADER).to_bytes(2, "big")
    return whole
