"""Joining packets of one flow into the super-packet that a TUN takes in one write.

Packets join only when cutting the result again gives the same packets: equal headers but for what a segment counts, consecutive
sequence numbers, PSH and FIN at the end only, DF set (the identification of an atomic datagram is free, RFC 6864).
The checksums of every packet are verified first. A super-packet gets fresh ones, and so would hide what was damaged before the
tunnel; a packet that does not verify goes on alone and unchanged, for its receiver to refuse.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kernel_shim.packet import virtio
from kernel_shim.packet.checksum import Rows, Words, partial_sum, pseudo_header_sum, row_sums, rows_verify
from kernel_shim.packet.ip import (
    IPV4_HEADER,
    IPV6_HEADER,
    LARGEST_PACKET,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    UDP_HEADER,
    Buffer,
    address_bytes,
    refresh_header_checksum,
)
from kernel_shim.packet.segment import TCP_CHECKSUM, TCP_FIN, TCP_HEADER, TCP_PSH, UDP_CHECKSUM

_UNMERGEABLE_FLAGS: Final = 0x02 | 0x04 | 0x20 | 0x80  # SYN, RST, URG, CWR
_ENDING: Final = TCP_FIN | TCP_PSH
_COUNTING: Final = np.arange(1 << 12, dtype=np.int64)
_FAMILY: Final = {
    (PROTOCOL_TCP, 4): virtio.GSO_TCPV4,
    (PROTOCOL_TCP, 6): virtio.GSO_TCPV6,
    (PROTOCOL_UDP, 4): virtio.GSO_UDP_L4,
    (PROTOCOL_UDP, 6): virtio.GSO_UDP_L4,
}


class Format(NamedTuple):
    """What packets have in common that may be joined. Offsets count from a row's first byte.

    In transport mode rows begin at the transport header (`upper` 0) and `prefix` is the IP header that belongs before each.
    """

    version: int
    protocol: int
    upper: int
    header: int
    length: int
    constant: int  # the sum over the pseudo header of one packet
    prefix: bytes

    @property
    def size(self) -> int:
        return self.length - self.header


def format_of(row: Buffer, length: int, prefix: bytes = b"", *, udp: bool = True) -> Format | None:
    """The format of a packet that may be joined with others; None when it may not. `length` excludes ESP's padding."""
    head = prefix or row
    if len(head) < IPV4_HEADER:
        return None
    if head[0] == 0x45:
        version, protocol, upper = 4, head[9], IPV4_HEADER
        if head[6] != 0x40 or head[7] or head[2] << 8 | head[3] != length + len(prefix):
            return None
    elif head[0] >> 4 == 6 and len(head) >= IPV6_HEADER:
        version, protocol, upper = 6, head[6], IPV6_HEADER
        if head[4] << 8 | head[5] != length + len(prefix) - IPV6_HEADER:
            return None
    else:
        return None
    if prefix:
        upper = 0
    if protocol == PROTOCOL_TCP and upper + TCP_HEADER < length:
        header = upper + (row[upper + 12] >> 4 << 2)
        if header < upper + TCP_HEADER or row[upper + 13] & _UNMERGEABLE_FLAGS:
            return None
    elif protocol == PROTOCOL_UDP and udp:
        header = upper + UDP_HEADER
        if length > header and (row[upper + 4] << 8 | row[upper + 5] != length - upper or not (row[upper + 6] or row[upper + 7])):
            return None
    else:
        return None
    if header >= length:
        return None
    return Format(version, protocol, upper, header, length, pseudo_header_sum(address_bytes(head), protocol, length - upper), prefix)


def runs(form: Format, rows: Rows, words: Words) -> list[tuple[int, int]]:
    """Cut the rows that are of the flow of the first, which has `form`, into ranges that may be joined.

    The ranges are in order and begin at 0; they end before the first row of another flow or length. Every row has the
    same length, padding and trailer included. Rows of a range longer than one are verified.
    """
    masked = words[:, : form.header >> 2] & _mask(form)
    count = len(rows)
    if count == 1 or _one_run(form, rows, words, masked):
        return [(0, count)]
    like = (masked == masked[0]).all(1) & (rows[:, -2:] == rows[0, -2:]).all(1)
    count = count if like.all() else int(like.argmin())
    if count == 1:
        return [(0, 1)]
    rows = rows[:count]
    sound = _sound(form, rows, words[:count])
    follows = sound[1:] & sound[:-1]
    if form.protocol == PROTOCOL_TCP:
        sequences = _sequences(form, rows).astype(np.uint32)
        follows &= (sequences[1:] - sequences[:-1]) == form.size
        follows &= rows[:-1, form.upper + 13] & _ENDING == 0
    else:
        follows &= (rows[1:, form.upper + 6 : form.upper + 8] != 0).any(1)
    breaks = (np.flatnonzero(~follows) + 1).tolist()
    return list(zip([0, *breaks], [*breaks, count], strict=True))


def _one_run(form: Format, rows: Rows, words: Words, masked: Words) -> bool:
    """Whether all rows are one range: what nearly always holds, found with few operations on whole columns."""
    count = len(rows)
    heads, ends = masked.tobytes(), rows[:, -2:].tobytes()
    if heads != heads[: form.header & ~3] * count or ends != ends[:2] * count:
        return False
    if form.protocol == PROTOCOL_TCP:
        flags = rows[:-1, form.upper + 13].tobytes()
        if flags[0] & _ENDING or flags != flags[:1] * (count - 1):
            return False
        sequences = (_sequences(form, rows) - _COUNTING[:count] * form.size).tobytes()
        if sequences != sequences[:8] * count:
            return False  # a wrap within the range too; the other way takes that
    elif not (rows[:, form.upper + 6 : form.upper + 8] != 0).any(1).all():
        return False
    return bool(_sound(form, rows, words).all())


def _sound(form: Format, rows: Rows, words: Words) -> npt.NDArray[np.bool_]:
    """Which rows verify. One sum goes over the IP header, itself zero, and what the transport checksum covers."""
    covered = words if form.version == 4 else words[:, form.upper >> 2 :]
    return rows_verify(row_sums(covered), form.constant + 0xFFFF - _trailing(form, rows))


def _sequences(form: Format, rows: Rows) -> npt.NDArray[np.int64]:
    column: npt.NDArray[np.int64] = rows[:, form.upper + 4 : form.upper + 8].view(">u4")[:, 0]
    return column


class Joiner:
    """Builds super-packets in one buffer of its own: `begin`, then `extend` and `append` while they fit, then `frame`."""

    def __init__(self, tail_room: int) -> None:
        self.buffer: Final = memoryview(bytearray(virtio.LENGTH + LARGEST_PACKET + 1 + tail_room))
        self._bytes: Final = np.frombuffer(self.buffer, np.uint8)
        self._end = self._segments = self._limit = 0
        self._shortened = False

    def begin(self, form: Format, rows: Rows) -> None:
        """Join `rows`, a range that `runs` gave. What is joined must be at most 65,535 bytes long, headers included, and of UDP `MAX_UDP_SEGMENTS`."""
        self._form, count = form, len(rows)
        start = virtio.LENGTH + len(form.prefix)
        self._head = start + form.header
        self.buffer[virtio.LENGTH : start] = form.prefix
        self._bytes[start : self._head] = rows[0, : form.header]
        self._end = self._head + count * form.size
        self._bytes[self._head : self._end].reshape(count, form.size)[:] = rows[:, form.header : form.length]
        self._segments, self._shortened = count, False
        self._limit = virtio.MAX_UDP_SEGMENTS if form.protocol == PROTOCOL_UDP else LARGEST_PACKET
        self._ending = 0
        if form.protocol == PROTOCOL_TCP:
            self._ending = int(rows[count - 1, form.upper + 13]) & _ENDING

    @property
    def complete(self) -> bool:
        """Nothing more can join: the last packet was a short one, or said that the data ends here, or these are as many as the kernel takes."""
        return self._shortened or self._ending != 0 or self._segments >= self._limit

    def extend(self, form: Format, rows: Rows) -> bool:
        """Join another range of verified rows; False when they do not continue what is here."""
        size = len(rows) * form.size
        if form != self._form or not self._continues(bytearray(rows[0, : form.header].tobytes()), size, len(rows)):
            return False
        self._bytes[self._end : self._end + size].reshape(len(rows), form.size)[:] = rows[:, form.header : form.length]
        self._end += size
        self._segments += len(rows)
        if form.protocol == PROTOCOL_TCP:
            self._ending = int(rows[-1, form.upper + 13]) & _ENDING
        return True

    def append(self, packet: Buffer) -> bool:
        """Join one packet more, no longer than the others (in transport mode without its IP header); False when it does not fit."""
        form = self._form
        length, upper = len(packet), form.upper
        size = length - form.header
        if not 0 < size <= form.size:
            return False
        header = bytearray(packet[: form.header])
        if form.protocol == PROTOCOL_TCP and header[upper + 13] & _UNMERGEABLE_FLAGS:
            return False
        if not _lengths_agree(form, header, length) or not verifies(form, packet) or not self._continues(header, size, 1):
            return False
        self.buffer[self._end : self._end + size] = packet[form.header :]
        self._end += size
        self._segments += 1
        self._shortened = size < form.size
        if form.protocol == PROTOCOL_TCP:
            self._ending = packet[upper + 13] & _ENDING
        return True

    def _continues(self, header: bytearray, size: int, count: int) -> bool:
        """Whether `size` bytes of `count` packets, the first behind `header`, come next in this flow, and fit. Uses `header` up."""
        form, upper = self._form, self._form.upper
        if self.complete or self._segments + count > self._limit or self._end - virtio.LENGTH + size > LARGEST_PACKET:
            return False
        mine = bytearray(self.buffer[virtio.LENGTH + len(form.prefix) : self._head])
        if form.protocol == PROTOCOL_TCP:
            sequence = int.from_bytes(mine[upper + 4 : upper + 8], "big") + self._end - self._head & 0xFFFFFFFF
            if header[upper + 4 : upper + 8] != sequence.to_bytes(4, "big"):
                return False
        return _canonical(form, mine) == _canonical(form, header)

    def frame(self) -> memoryview:
        """What was joined, with its virtio header. Nothing can join it any more."""
        form, upper = self._form, virtio.LENGTH + len(self._form.prefix) + self._form.upper
        buffer, total = self.buffer, self._end - virtio.LENGTH
        covered = self._end - upper
        packet = buffer[virtio.LENGTH : self._end]
        if form.version == 4:
            buffer[virtio.LENGTH + 2 : virtio.LENGTH + 4] = total.to_bytes(2, "big")
            refresh_header_checksum(packet)
        else:
            buffer[virtio.LENGTH + 4 : virtio.LENGTH + 6] = (total - IPV6_HEADER).to_bytes(2, "big")
        if form.protocol == PROTOCOL_TCP:
            buffer[upper + 13] |= self._ending
            offset = TCP_CHECKSUM
        else:
            buffer[upper + 4 : upper + 6] = covered.to_bytes(2, "big")
            offset = UDP_CHECKSUM
        partial = pseudo_header_sum(address_bytes(packet), form.protocol, covered)
        buffer[upper + offset : upper + offset + 2] = partial.to_bytes(2, "little")
        # A TUN takes segmentation only together with NEEDS_CSUM.
        kind = _FAMILY[form.protocol, form.version] if self._segments > 1 else virtio.GSO_NONE
        size = form.size if self._segments > 1 else 0
        virtio.pack_into(buffer, virtio.VnetHeader(virtio.NEEDS_CHECKSUM, kind, self._head - virtio.LENGTH, size, upper - virtio.LENGTH, offset))
        return buffer[: self._end]


_MASKS: Final[dict[tuple[int, int, int, int], Words]] = {}


def _mask(form: Format) -> Words:
    """Which bits of the headers are equal in packets that may be joined, as little-endian words."""
    key = (form.version, form.protocol, form.upper, form.header)
    mask = _MASKS.get(key)  # a few dozen keys: TCP has eleven header lengths
    if mask is None:
        mask = _MASKS[key] = np.frombuffer(_canonical(form, bytearray(b"\xff" * form.header), lengths=True), "<u4")
    return mask


def _canonical(form: Format, header: bytearray, *, lengths: bool = False) -> bytearray:
    """`header` with zeros for what differs between segments. With `lengths`, those stay: full segments share them."""
    upper = form.upper
    if form.version == 4 and not form.prefix:
        header[4:6] = header[10:12] = b"\0\0"
        if not lengths:
            header[2:4] = b"\0\0"
    elif form.version == 6 and not form.prefix and not lengths:
        header[4:6] = b"\0\0"
    if form.protocol == PROTOCOL_TCP:
        header[upper + 4 : upper + 8] = b"\0\0\0\0"
        header[upper + 13] &= ~_ENDING
        header[upper + 16 : upper + 18] = b"\0\0"
    else:
        header[upper + 6 : upper + 8] = b"\0\0"
        if not lengths:
            header[upper + 4 : upper + 6] = b"\0\0"
    return header


def _trailing(form: Format, rows: Rows) -> int:
    covered = form.length - form.upper
    return partial_sum(bytes(covered % 4) + rows[0, form.length :].tobytes())


def _lengths_agree(form: Format, header: bytearray, length: int) -> bool:
    if not form.prefix:
        if form.version == 4 and header[2] << 8 | header[3] != length:
            return False
        if form.version == 6 and (header[4] << 8 | header[5]) + IPV6_HEADER != length:
            return False
    if form.protocol == PROTOCOL_UDP:
        upper = form.upper
        return header[upper + 4] << 8 | header[upper + 5] == length - upper and any(header[upper + 6 : upper + 8])
    return True


def verifies(form: Format, packet: Buffer) -> bool:
    """Whether the checksums of one packet of this form, which may be shorter than the others, are right."""
    if form.version == 4 and not form.prefix and partial_sum(packet[: form.upper]):
        return False
    # The constant holds the length of a full segment.
    missing = form.length - len(packet)
    total = partial_sum(packet[form.upper :]) + form.constant
    return (total - _swapped_difference(form.length - form.upper, missing)) % 0xFFFF == 0


def _swapped_difference(covered: int, missing: int) -> int:
    def swapped(value: int) -> int:
        return (value & 0xFF) << 8 | value >> 8

    return swapped(covered) - swapped(covered - missing)
