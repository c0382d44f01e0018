"""Sealing: a packet, or a super-packet in rows, becomes ESP in the SA's batch or straight in a send."""

from __future__ import annotations

from typing import Final

import numpy as np

from kernel_shim.dataplane.batch import Batches
from kernel_shim.dataplane.bundle import Bundle
from kernel_shim.dataplane.origin import LARGEST_COVER
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.esp.rows import MAX_DATAGRAMS, MAX_ROWS, Workspace
from kernel_shim.esp.wire import trailer
from kernel_shim.packet.ip import IPV6_HEADER, LARGEST_PACKET, PROTOCOL_IPIP, PROTOCOL_IPV6
from kernel_shim.packet.segment import SuperPacket, fill_rows, segment
from kernel_shim.packet.traffic_class import DSCP, traffic_class
from kernel_shim.reasons import DropReason
from kernel_shim.sa.database import Sad
from kernel_shim.sa.entry import SaEntry

TAIL_ROOM: Final = 32  # bytes behind a frame that sealing in place may write: the longest ESP trailer is 17


_NEXT_HEADER: Final = {4: PROTOCOL_IPIP, 6: PROTOCOL_IPV6}


class Sealing:
    """Takes sequence numbers and charges SAs; an SA's packets leave in the order of its numbers."""

    def __init__(self, sink: Sink, traffic: Traffic, sad: Sad) -> None:
        self._sink, self._traffic, self._sad = sink, traffic, sad
        self.batches: Final = Batches(sink, traffic)
        self._workspace: Final = Workspace()
        self._piece: Final = memoryview(bytearray(LARGEST_PACKET + LARGEST_COVER + TAIL_ROOM))
        self._padded: Final = memoryview(bytearray(LARGEST_PACKET + TAIL_ROOM))

    def piece(self, bundle: Bundle, piece: bytearray | memoryview, now: float) -> bool:
        """Seal a packet that is elsewhere, under the bundle's cover; one over the path's MTU travels in fragments.

        False when the SA is used up: then nothing was sent, and nothing is counted.
        """
        entry = bundle.entry
        assert entry is not None
        assert entry.cipher is not None
        if not entry.room(1) or not entry.usable:
            self._sad.expire_hard(entry)
            return False
        length, cover = len(piece), b"" if bundle.cover is None else bundle.cover.before(piece, len(piece))
        whole = len(cover) + length
        if entry.cipher.shape.sealed(whole) > MAX_DATAGRAMS:
            self._traffic.drop(DropReason.TOO_BIG)
            return True
        self._piece[: len(cover)] = cover
        self._piece[len(cover) : whole] = piece
        if length <= bundle.limit:
            self.one(bundle, entry, self._piece, 0, whole, now)
        else:
            self.batches.flush(entry)
            self.one(bundle, entry, self._piece, 0, whole, now)
            self.batches.flush_in_fragments(entry)
        return True

    def one(self, bundle: Bundle, entry: SaEntry, frame: memoryview, begin: int, end: int, now: float) -> None:
        """Seal the packet at `begin` to `end`, its cover included, behind which TAIL_ROOM bytes are free. The SA has room for it."""
        cipher = entry.cipher
        assert cipher is not None
        if bundle.padded > end - begin:
            frame, begin, end = self._pad(frame[begin:end], bundle.padded)
        first = frame[begin]
        if bundle.cover is not None:
            outer_class = traffic_class(frame[begin + bundle.cover.length : end]) & entry.inner_class & DSCP
        else:
            outer_class = frame[begin + 1] if first >> 4 == 4 else (first & 15) << 4 | frame[begin + 1] >> 4
            if outer_class:
                outer_class &= entry.inner_class
        next_header = PROTOCOL_IPIP if first >> 4 == 4 else PROTOCOL_IPV6
        if bundle.transport:
            if first >> 4 == 4:
                next_header, end = frame[begin + 9], begin + (frame[begin + 2] << 8 | frame[begin + 3])
                begin += (first & 15) << 2
            else:
                next_header, begin = frame[begin + 6], begin + IPV6_HEADER
        elif bundle.cover is not None:
            next_header = bundle.cover.next_header
        shape = cipher.shape
        length = end - begin
        tail = trailer(length, shape.alignment, next_header)
        stop = end + len(tail)
        frame[end:stop] = tail
        entry.sequence += 1
        cipher.seal(entry.sequence, frame[begin:stop], self.batches.slot(entry, shape.overhead + stop - begin, outer_class))
        self._traffic.out_packets += 1
        self._traffic.out_octets += length
        self._sad.charge(entry, 1, length, now)

    def _pad(self, packet: memoryview, padded: int) -> tuple[memoryview, int, int]:
        """RFC 4303 section 2.7: the packet with octets behind it that its own length leaves out; where it then is."""
        length = len(packet)
        self._padded[:length] = packet
        self._padded[length:padded] = bytes(padded - length)
        self._traffic.tfc_padded += 1
        return self._padded, 0, padded

    def big(self, bundle: Bundle, entry: SaEntry, big: SuperPacket, now: float) -> None:
        """Seal the segments of a super-packet, in rows. The SA has room for them."""
        cipher = entry.cipher
        assert cipher is not None
        self.batches.flush(entry)
        shape = cipher.shape
        strip = big.upper if bundle.transport else 0
        next_header = big.protocol if bundle.transport else _NEXT_HEADER[big.version]
        cover = b""
        if bundle.cover is not None:
            cover, next_header = bundle.cover.before(big.packet, big.segment_length), bundle.cover.next_header
        before = len(cover)
        length = before + big.segment_length - strip
        rows = self._workspace.rows(shape.sealed(length), shape)
        tail = trailer(length, shape.alignment, next_header)
        total, done = big.segments, 0
        outer_class, whole = traffic_class(big.packet) & entry.inner_class, entry.sa.copies.df
        if bundle.cover is not None:
            outer_class &= DSCP
        full = (len(big.packet) - big.header) // big.size
        wire, size = rows.wire_buffer, rows.wire_length
        at_once = min(MAX_ROWS, MAX_DATAGRAMS // size) * size
        while done < total:
            count, end = min(full - done, rows.capacity), 0
            if count:
                rows.plaintext[:count, :before] = np.frombuffer(cover, np.uint8)
                fill_rows(big, done, rows.plaintext[:count, before:], rows.words[:count, before >> 2 :], strip, tail)
                cipher.seal_rows(rows, count, entry.sequence + 1)
                entry.sequence += count
                done += count
                end = count * size
            if done == full < total and count < rows.capacity:
                end = self._rest(bundle, entry, big, strip, next_header, wire, end)
                done = total
            for begin in range(0, end, at_once):
                self._traffic.out_sends += 1
                self._sink.send_esp(entry.local, entry.remote, wire[begin : min(begin + at_once, end)], size, whole=whole, traffic_class=outer_class)
        octets = len(big.packet) - big.header + total * (before + big.header - strip)
        self._traffic.out_packets += total
        self._traffic.out_octets += octets
        self._sad.charge(entry, total, octets, now)

    def _rest(self, bundle: Bundle, entry: SaEntry, big: SuperPacket, strip: int, next_header: int, wire: memoryview, begin: int) -> int:
        """Seal the last, shorter segment at `begin` of `wire`; where it ends."""
        cipher = entry.cipher
        assert cipher is not None
        last = big.segments - 1
        packet = segment(big, last, last)[strip:]
        if bundle.cover is not None:
            packet[:0] = bundle.cover.before(packet, len(packet))
        packet += bytes(max(0, bundle.padded - len(packet)))
        packet += trailer(len(packet), cipher.shape.alignment, next_header)
        end = begin + cipher.shape.overhead + len(packet)
        entry.sequence += 1
        cipher.seal(entry.sequence, memoryview(packet), wire[begin:end])
        return end
