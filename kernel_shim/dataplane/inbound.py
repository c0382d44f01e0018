"""The way of an ESP datagram to the TUN.

1. `take`         what one UDP_GRO receive gave: rows of one length, and a shorter last one
2. `_find`        SPI and destination -> SA; a larval SA keeps the packet until its keys come
3. `_open_rows`, `_open_one`  replay check, opening, replay update; rows with consecutive fresh numbers all at once
4. `_authentic`   counters, lifetimes, the peer's new address
5. `_look_outside`  ECN and, where that is asked for, DSCP of the outer header go into the inner one
6. deliver        where the payload belongs (`delivery`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from kernel_shim.dataplane.delivery import PACKET, VERSION_OF, Delivery
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.esp.rows import Workspace
from kernel_shim.esp.wire import HEADER_FORMAT, SEQUENCE_LIMIT, TRAILER, strip
from kernel_shim.model import Endpoint, NewMapping
from kernel_shim.packet.ip import IPV4_HEADER
from kernel_shim.packet.traffic_class import DSCP, ECN, decapsulated_ecn, set_traffic_class, traffic_class
from kernel_shim.reasons import DropReason
from kernel_shim.sa.database import Sad
from kernel_shim.sa.entry import SaEntry, Waiting

# Limits of this implementation
ROWS_FROM: Final = 3  # fewer packets than this are opened one by one
NEW_ROWS_FROM: Final = 8  # and as many for a length that was not seen of late: to lay out its rows costs as much as opening twenty packets
MAX_LARVAL_OCTETS: Final = 16 << 20  # what waits for the keys of all larval SAs, as much as fifteen may have; nobody has authenticated it
MAPPING_SECONDS: Final = 1.0  # a peer's address is taken to have changed at most this often

_KEEPALIVE: Final = 0xFF


class Inbound:
    def __init__(
        self,
        buffer: memoryview,
        traffic: Traffic,
        sad: Sad,
        delivery: Delivery,
        emit: Callable[[NewMapping], None],
    ) -> None:
        self._traffic, self._sad, self._delivery, self._emit = traffic, sad, delivery, emit
        self._buffer: Final = buffer
        self._workspace: Final = Workspace(buffer)
        self._single: Final = delivery.single
        self.waiting_octets = 0  # of larval SAs; who takes the packets out subtracts them
        self._outer = 0  # traffic class of what is being taken

    # 1. Take

    def take(self, local: Endpoint, remote: Endpoint, length: int, segment: int, now: float, traffic_class: int = 0) -> None:
        """Datagrams at the start of the buffer that this pipeline was made with."""
        buffer, done = self._buffer, 0
        self._outer = self._delivery.outer = traffic_class
        if not 0 < segment <= length:
            segment = max(length, 1)
        while length - done >= ROWS_FROM * segment:
            if done:  # more rows than a layout has: the others move to where it begins
                buffer[: length - done] = buffer[done:length]
                length, done = length - done, 0
            done = self._open_rows(local, remote, length, segment, now)
            if not done:
                break
        for begin in range(done, length, segment):
            self.take_one(local, remote, buffer[begin : min(begin + segment, length)], now, traffic_class)

    def take_one(self, local: Endpoint, remote: Endpoint, packet: memoryview, now: float, traffic_class: int = 0) -> None:
        self._outer = self._delivery.outer = traffic_class
        opened = self._open_one(local, remote, packet, now)
        if opened is not None:
            self._delivery.one(*opened, now)

    # 2. Find

    def _find(self, spi: int, local: Endpoint) -> SaEntry | None:
        for entry in self._sad.inbound(spi):
            if entry.local_seen is local:
                return entry
            if entry.local.address == local.address:
                entry.local_seen = local
                return entry
        return None

    def _hold(self, entry: SaEntry, local: Endpoint, remote: Endpoint, packet: memoryview) -> None:
        if self.waiting_octets + len(packet) > MAX_LARVAL_OCTETS or not entry.hold(Waiting(local, remote, bytes(packet), self._outer)):
            return self._traffic.drop(DropReason.LARVAL_OVERFLOW)
        self.waiting_octets += len(packet)

    # 3. Open

    def _open_rows(self, local: Endpoint, remote: Endpoint, length: int, segment: int, now: float) -> int:
        """Open rows of one SA with one check for all, and a shorter packet behind them; how many bytes that were.

        0 when they must go one by one: another SA among them, an old number, a false ICV.
        """
        spi, low = HEADER_FORMAT.unpack_from(self._buffer) if segment >= HEADER_FORMAT.size else (0, 0)
        entry = self._find(spi, local)
        if entry is None or entry.cipher is None or not entry.usable or not entry.cipher.shape.plausible(segment):
            return 0
        if length < NEW_ROWS_FROM * segment and not self._workspace.knows(segment, entry.cipher.shape):
            return 0
        rows = self._workspace.rows(segment, entry.cipher.shape)
        count = min(length // segment, rows.capacity)
        window, first = entry.window, entry.window.extend(low)
        counting = rows.tables.counting[:count]
        marks = (rows.wire_marks[:count] - counting).tobytes()
        consecutive = marks == marks[:8] * count
        sequences = counting + np.uint64(max(first, 0))
        if not consecutive:
            # Packets were lost on the way: the numbers still ascend, which leaves each of them fresh if the first one is.
            distances = rows.wire_marks[:count] - rows.wire_marks[0]
            if not (distances[1:] > distances[:-1]).all() or int(distances[-1]) > SEQUENCE_LIMIT - low:
                first = 0
            sequences = distances + np.uint64(max(first, 0))
        if (
            first <= window.top
            or low + count - 1 > SEQUENCE_LIMIT
            or entry.packets + count > entry.hard_packets
            or not entry.cipher.open_rows(rows, count, sequences)
        ):
            self._traffic.batch_fallbacks += 1
            return 0
        if consecutive:
            window.accept_run(first, count)
        else:
            for sequence in sequences.tolist():
                window.accept(sequence)
        octets = count * (rows.plaintext_length - TRAILER) - sum(rows.trailers[:count, 0].tobytes())
        self._authentic(entry, remote, True, count, max(0, octets), now)
        begin = end = count * segment
        tail = None
        if 0 < length - begin < segment:
            end = length
            tail = self._open_one(local, remote, self._buffer[begin:length], now)
        if entry.looks_outside and (self._outer & ECN or entry.sa.copies.dscp_in):
            passed = [self._look_outside(entry, view) for view in rows.plaintext_views[:count]]
            if not all(passed):
                for row in range(count):
                    if passed[row]:
                        self._delivery.row(entry, rows.plaintext_views[row], now)
                count = 0
        self._delivery.rows(entry, rows, count, tail, now)
        return end

    def _open_one(self, local: Endpoint, remote: Endpoint, packet: memoryview, now: float) -> tuple[SaEntry, int, int] | None:
        """Open one packet into `_single`: its SA, where the payload ends and its next header. None when it was dropped or kept."""
        length, drop = len(packet), self._traffic.drop
        if length < HEADER_FORMAT.size:
            return drop(DropReason.KEEPALIVE if length == 1 and packet[0] == _KEEPALIVE else DropReason.ESP_MALFORMED)
        spi, low = HEADER_FORMAT.unpack_from(packet)
        entry = self._find(spi, local)
        if entry is None:
            return drop(DropReason.SA_UNKNOWN)
        cipher = entry.cipher
        if cipher is None:
            self._hold(entry, local, remote, packet)
            return None
        if not cipher.shape.plausible(length):
            return drop(DropReason.ESP_MALFORMED)
        sequence = entry.window.extend(low)
        if not entry.window.fresh(sequence):
            return drop(DropReason.REPLAYED)
        begin = PACKET
        plaintext = self._single[begin : begin + length - cipher.shape.overhead]
        if not cipher.open(sequence, packet, plaintext):
            return drop(DropReason.ICV_MISMATCH)
        newest = sequence > entry.window.top
        entry.window.accept(sequence)
        stripped = strip(plaintext)
        self._authentic(entry, remote, newest, 1, stripped[0] if stripped else 0, now)
        if stripped is None:
            return drop(DropReason.ESP_MALFORMED)
        if entry.looks_outside and (self._outer & ECN or entry.sa.copies.dscp_in) and not self._look_outside(entry, plaintext):
            return None
        return entry, begin + stripped[0], stripped[1]

    # 4. Authentic

    def _authentic(self, entry: SaEntry, remote: Endpoint, newest: bool, packets: int, octets: int, now: float) -> None:
        self._traffic.in_packets += packets
        self._traffic.in_octets += octets
        # An old packet says where the peer was, not where it is.
        if newest and remote is not entry.remote and now - entry.mapped_at >= MAPPING_SECONDS and remote != entry.remote and remote.port and entry.remote.port:
            old, entry.remote, entry.mapped_at = entry.remote, remote, now
            self._emit(NewMapping(entry.sa.id, entry.sa.reqid, old, remote))
        self._sad.charge(entry, packets, octets, now)

    # 5. Look outside

    def _look_outside(self, entry: SaEntry, packet: memoryview) -> bool:
        """RFC 6040 section 4.2 for one opened packet, trailer included; False when it is to be dropped."""
        if len(packet) < IPV4_HEADER or packet[0] >> 4 != VERSION_OF.get(packet[-1]):
            return True  # nothing tunnelled, or damaged: to be found out further on
        copies, inner = entry.sa.copies, traffic_class(packet)
        result = inner
        if copies.dscp_in:
            result = self._outer & DSCP | result & ECN
        if copies.ecn:
            ecn, alarm = decapsulated_ecn(inner, self._outer)
            self._traffic.ecn_alarms += alarm
            if ecn is None:
                self._traffic.drop(DropReason.ECN_INVALID)
                return False
            result = result & DSCP | ecn
        if result != inner:
            set_traffic_class(packet, result)
        return True
