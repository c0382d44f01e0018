"""Cutting a super-packet of TCP or UDP segmentation offload into the packets that it stands for.

A super-packet has one set of headers and up to 64 KB of payload; each segment gets a copy of the headers with lengths, sequence number,
flags and checksums of its own, as net/ipv4/tcp_offload.c and udp_offload.c of Linux make them. Under DF the IPv4
identification stays the same (RFC 6864 section 4.1 allows it); without DF it counts up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kernel_shim.packet import virtio
from kernel_shim.packet.checksum import Rows, Words, checksum, partial_sum, pseudo_header_sum, row_checksums, row_sums, udp_checksum
from kernel_shim.packet.ip import IPV6_HEADER, LARGEST_PACKET, PROTOCOL_TCP, PROTOCOL_UDP, UDP_HEADER, Malformed, address_bytes, layout, refresh_header_checksum

TCP_FIN: Final = 0x01
TCP_PSH: Final = 0x08
TCP_CWR: Final = 0x80
TCP_HEADER: Final = 20
TCP_CHECKSUM: Final = 16
UDP_CHECKSUM: Final = 6
CHECKSUM_FIELDS: Final = {PROTOCOL_TCP: TCP_CHECKSUM, PROTOCOL_UDP: UDP_CHECKSUM}

_COUNTING: Final = np.arange(65536, dtype=np.int64)


class SuperPacket(NamedTuple):
    """`packet` without its virtio header. `upper` is the offset of TCP or UDP, `header` that of the payload, `size` the payload of one segment."""

    packet: memoryview
    version: int
    protocol: int
    upper: int
    header: int
    size: int
    dont_fragment: bool

    @property
    def segments(self) -> int:
        return -(-(len(self.packet) - self.header) // self.size)

    @property
    def segment_length(self) -> int:
        """Length of a full segment as an IP packet."""
        return self.header + self.size


def read_super(vnet: virtio.VnetHeader, packet: memoryview) -> SuperPacket:
    """The super-packet that `vnet` announces. Raises Malformed when header and packet disagree."""
    kind = vnet.gso_type & ~virtio.GSO_ECN
    protocol = {virtio.GSO_TCPV4: PROTOCOL_TCP, virtio.GSO_TCPV6: PROTOCOL_TCP, virtio.GSO_UDP_L4: PROTOCOL_UDP}.get(kind)
    parsed = layout(packet)
    if protocol is None or parsed.protocol != protocol or parsed.fragment or vnet.gso_size == 0:
        raise Malformed("not a super-packet that can be cut")
    minimum = TCP_HEADER if protocol == PROTOCOL_TCP else UDP_HEADER
    if parsed.upper + minimum > parsed.length or parsed.upper % 4:
        raise Malformed("super-packet without a transport header")
    header = parsed.upper + (packet[parsed.upper + 12] >> 4 << 2 if protocol == PROTOCOL_TCP else UDP_HEADER)
    if header < parsed.upper + minimum or header >= parsed.length or header + vnet.gso_size > LARGEST_PACKET:
        raise Malformed("super-packet without payload")
    return SuperPacket(packet[: parsed.length], parsed.version, protocol, parsed.upper, header, vnet.gso_size, parsed.dont_fragment)


def segments(big: SuperPacket) -> Iterator[bytearray]:
    """Each segment as a packet of its own."""
    position, index, last = big.header, 0, big.segments - 1
    while position < len(big.packet):
        yield segment(big, index, last)
        position += big.size
        index += 1


def segment(big: SuperPacket, index: int, last: int) -> bytearray:
    """Segment number `index`; `last` is the number of the last one."""
    begin = big.header + index * big.size
    packet = bytearray(big.packet[: big.header])
    packet += big.packet[begin : begin + big.size]
    _set_lengths(packet, big, len(packet))
    if big.version == 4:
        if not big.dont_fragment:
            packet[4:6] = (int.from_bytes(packet[4:6], "big") + index & 0xFFFF).to_bytes(2, "big")
        refresh_header_checksum(packet)
    upper = big.upper
    if big.protocol == PROTOCOL_TCP:
        sequence = int.from_bytes(packet[upper + 4 : upper + 8], "big") + index * big.size & 0xFFFFFFFF
        packet[upper + 4 : upper + 8] = sequence.to_bytes(4, "big")
        packet[upper + 13] = segment_flags(packet[upper + 13], index, last)
    finish_checksum(packet, upper, big.protocol)
    return packet


def segment_flags(flags: int, index: int, last: int) -> int:
    """RFC 3168 section 6.1.2 for CWR; FIN and PSH belong to the end of the data."""
    if index:
        flags &= ~TCP_CWR
    return flags if index == last else flags & ~(TCP_FIN | TCP_PSH)


def finish_checksum(packet: bytearray | memoryview, upper: int, protocol: int) -> None:
    """Fill the TCP or UDP checksum of a whole packet."""
    field = upper + CHECKSUM_FIELDS[protocol]
    packet[field : field + 2] = b"\0\0"
    total = partial_sum(packet[upper:]) + pseudo_header_sum(address_bytes(packet), protocol, len(packet) - upper)
    value = checksum(total) if protocol == PROTOCOL_TCP else udp_checksum(total)
    packet[field : field + 2] = value.to_bytes(2, "little")


def complete_checksum(vnet: virtio.VnetHeader, packet: memoryview) -> bool:
    """Finish a checksum that the sender left to the device: the field holds the pseudo header's sum. False when it is out of bounds."""
    start, field = vnet.checksum_start, vnet.checksum_start + vnet.checksum_offset
    if start >= len(packet) or field + 2 > len(packet):
        return False
    # Never 0: the field of a UDP packet says "none" then, and TCP takes either representation.
    packet[field : field + 2] = udp_checksum(partial_sum(packet[start:])).to_bytes(2, "little")
    return True


def fill_rows(big: SuperPacket, first: int, rows: Rows, words: Words, strip: int, trailer: bytes) -> None:
    """Write full segments from number `first` into `rows`, all of them, without their first `strip` bytes and with `trailer` behind.

    `words` is the same memory as `rows` in little-endian words. `strip` is 0 (tunnel mode) or `big.upper` (transport mode).
    """
    count, length, upper = len(rows), big.segment_length, big.upper - strip
    last_index = big.segments - 1
    head = bytearray(big.packet[: big.header])
    _set_lengths(head, big, length)
    field = big.upper + CHECKSUM_FIELDS[big.protocol]
    head[field : field + 2] = b"\0\0"
    flags = 0
    if big.protocol == PROTOCOL_TCP:
        flags = head[big.upper + 13]
        head[big.upper + 13] = flags & ~(TCP_CWR | TCP_FIN | TCP_PSH)
    if big.version == 4:
        refresh_header_checksum(head)
    rows[:, : big.header - strip] = np.frombuffer(head, np.uint8)[strip:]
    begin = big.header + first * big.size
    payload = np.frombuffer(big.packet[begin : begin + count * big.size], np.uint8)
    rows[:, big.header - strip : length - strip] = payload.reshape(count, big.size)
    rows[:, length - strip :] = np.frombuffer(trailer, np.uint8)
    numbers = _COUNTING[first : first + count]
    if big.version == 4 and not big.dont_fragment and not strip:
        _count_identification(head, numbers, rows)
    if big.protocol == PROTOCOL_TCP:
        sequence = int.from_bytes(head[big.upper + 4 : big.upper + 8], "big")
        _column(rows, upper + 4, ">u4")[:] = numbers * big.size + sequence & 0xFFFFFFFF
        if first == 0:
            rows[0, upper + 13] = segment_flags(flags, 0, last_index)
        if first + count - 1 == last_index:
            rows[count - 1, upper + 13] = segment_flags(flags, last_index, last_index)
    covered = length - big.upper
    constant = pseudo_header_sum(address_bytes(head), big.protocol, covered)
    constant += 0xFFFF - partial_sum(bytes(covered % 4) + trailer)
    checksums = row_checksums(row_sums(words[:, upper >> 2 :]), constant)
    if big.protocol == PROTOCOL_UDP:
        checksums[checksums == 0] = 0xFFFF
    _column(rows, field - strip, "<u2")[:] = checksums


def _column(rows: Rows, offset: int, kind: str) -> npt.NDArray[np.int64]:
    size = int(kind[-1])
    return rows[:, offset : offset + size].view(kind)[:, 0]


def _count_identification(head: bytearray, numbers: npt.NDArray[np.int64], rows: Rows) -> None:
    identification = int.from_bytes(head[4:6], "big")
    bare = bytearray(head[: (head[0] & 15) << 2])
    bare[4:6] = bare[10:12] = b"\0\0"
    values = numbers + identification & 0xFFFF
    _column(rows, 4, ">u2")[:] = values
    swapped = (values & 0xFF) << 8 | values >> 8
    _column(rows, 10, "<u2")[:] = -(swapped + partial_sum(bare)) % 0xFFFF


def _set_lengths(packet: bytearray, big: SuperPacket, length: int) -> None:
    if big.version == 4:
        struct.pack_into("!H", packet, 2, length)
    else:
        struct.pack_into("!H", packet, 4, length - IPV6_HEADER)
    if big.protocol == PROTOCOL_UDP:
        struct.pack_into("!H", packet, big.upper + 4, length - big.upper)
