"""The way of an ESP datagram to the TUN.

1. `take`         what one UDP_GRO receive gave: rows of one length, and a shorter last one
2. `_find`        SPI and destination -> SA; a larval SA keeps the packet until its keys come
3. `_open_rows`, `_open_one`  replay check, opening, replay update; rows with consecutive fresh numbers all at once
4. `_authentic`   counters, lifetimes, the peer's new address
5. `_look_outside`  ECN and, where that is asked for, DSCP of the outer header go into the inner one
6. `_deliver_rows`, `_deliver_one`  padding, next header; in transport mode a new IP header
7. `_admit`       the SA's own selectors and the inbound SPD, remembered by flow and SA
8. `_write`       joined with its neighbours to the TUN, or straight into another tunnel
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from kernel_shim.dataplane.labels import Inside, Labels, Landing, inside
from kernel_shim.dataplane.outbound import Outbound
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.sealing import TAIL_ROOM
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.esp.rows import Rows, Workspace
from kernel_shim.esp.wire import HEADER_FORMAT, SEQUENCE_LIMIT, TRAILER, strip
from kernel_shim.model import Action, Direction, Endpoint, Mode, NewMapping
from kernel_shim.mpls.encapsulation import NotLabels
from kernel_shim.mpls.node import Tunnel
from kernel_shim.packet import virtio
from kernel_shim.packet.checksum import partial_sum, pseudo_header_sum
from kernel_shim.packet.coalesce import Format, Joiner, format_of, runs, verifies
from kernel_shim.packet.ip import (
    IPV4_HEADER,
    IPV6_HEADER,
    NO_NEXT_HEADER,
    PROTOCOL_IPIP,
    PROTOCOL_IPV6,
    PROTOCOL_UDP,
    Malformed,
    address_bytes,
    build_header,
    decrement_ttl,
    layout,
)
from kernel_shim.packet.segment import CHECKSUM_FIELDS, finish_checksum
from kernel_shim.packet.traffic_class import DSCP, ECN, decapsulated_ecn, set_traffic_class, traffic_class
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import FlowKeys, flow_of_key
from kernel_shim.policy.spd import SecurityPolicyDatabase
from kernel_shim.reasons import DropReason
from kernel_shim.sa.database import Sad, covers
from kernel_shim.sa.entry import SaEntry, Waiting

# Limits of this implementation
ROWS_FROM: Final = 3  # fewer packets than this are opened one by one
NEW_ROWS_FROM: Final = 8  # and as many for a length that was not seen of late: to lay out its rows costs as much as opening twenty packets
FLOWS_IN_ROWS: Final = 4  # of more flows than that in one receive the others are delivered one by one
MAX_LARVAL_OCTETS: Final = 16 << 20  # what waits for the keys of all larval SAs; nobody has authenticated it
MAPPING_SECONDS: Final = 1.0  # a peer's address is taken to have changed at most this often

_BEGIN: Final = virtio.LENGTH
_PREFIX_ROOM: Final = IPV6_HEADER  # room before an opened packet for the header that transport mode gives back
_KEEPALIVE: Final = 0xFF
_VERSION: Final = {PROTOCOL_IPIP: 4, PROTOCOL_IPV6: 6}


@dataclass(frozen=True, slots=True)
class Admission:
    """What becomes of a flow that comes out of an SA. `reason` None lets it in; `onward` sends it into another tunnel.

    `landing`: it came under labels that lead to a VRF.
    """

    reason: DropReason | None
    onward: bool = False
    landing: Landing | None = None


class Joinable(NamedTuple):
    """A form, and what stands before it in a row: `before` octets that end with `stack`. Without labels the admission is found run by run."""

    form: Format
    before: int = 0
    stack: bytes = b""
    admission: Admission | None = None


class Inbound:
    def __init__(
        self,
        buffer: memoryview,
        sink: Sink,
        traffic: Traffic,
        spd: SecurityPolicyDatabase,
        sad: Sad,
        keys: FlowKeys,
        cache: BundleCache[Admission],
        outbound: Outbound,
        labels: Labels,
        emit: Callable[[NewMapping], None],
        *,
        udp_segmentation: bool,
    ) -> None:
        self._sink, self._traffic, self._spd, self._sad = sink, traffic, spd, sad
        self._keys, self._cache, self._outbound, self._labels, self._emit = keys, cache, outbound, labels, emit
        self._udp_segmentation = udp_segmentation
        self._buffer: Final = buffer
        self._workspace: Final = Workspace(buffer)
        self._single: Final = memoryview(bytearray(_BEGIN + _PREFIX_ROOM + 65535 + TAIL_ROOM))
        self._row: Final = memoryview(bytearray(_BEGIN + _PREFIX_ROOM + 65535 + TAIL_ROOM))
        self._joiner: Final = Joiner(TAIL_ROOM)
        self.waiting_octets = 0  # of larval SAs; who takes the packets out subtracts them
        self._open: tuple[SaEntry, Admission] | None = None  # whose packets the joiner holds
        self._outer = 0  # traffic class of what is being taken

    # 1. Take

    def take(self, local: Endpoint, remote: Endpoint, length: int, segment: int, now: float, traffic_class: int = 0) -> None:
        """Datagrams at the start of the buffer that this pipeline was made with."""
        buffer, done = self._buffer, 0
        self._outer = traffic_class
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
        self._outer = traffic_class
        opened = self._open_one(local, remote, packet, now)
        if opened is not None:
            self._deliver_one(*opened, now)

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
                        self._deliver_row(entry, rows.plaintext_views[row], now)
                count = 0
        self._deliver_rows(entry, rows, count, tail, now)
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
        begin = _BEGIN + _PREFIX_ROOM
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
        if len(packet) < IPV4_HEADER or packet[0] >> 4 != _VERSION.get(packet[-1]):
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

    # 6. Deliver

    def _deliver_one(self, entry: SaEntry, end: int, next_header: int, now: float) -> None:
        """Deliver what `_open_one` left in `_single`, up to `end`."""
        begin = _BEGIN + _PREFIX_ROOM
        if next_header == NO_NEXT_HEADER:
            return self._traffic.drop(DropReason.DUMMY)
        self._deliver_packet(entry, self._single, begin, end, next_header, now)

    def _deliver_packet(self, entry: SaEntry, buffer: memoryview, begin: int, end: int, next_header: int, now: float) -> None:
        """Deliver the packet at `begin` to `end`; there is room for two headers before it and for a trailer behind."""
        if entry.tunnel is not None:
            try:
                labels = inside(entry.tunnel, entry.sa, buffer[begin:end], next_header)
            except NotLabels:
                return self._traffic.drop(DropReason.MPLS_ENCAPSULATION)
            if labels is not None:
                return self._deliver_labelled(entry, entry.tunnel, buffer, begin, end, next_header, labels, now)
        if entry.sa.mode is Mode.TRANSPORT:
            header = self._prefix(entry, next_header, end - begin)
            begin -= len(header)
            buffer[begin : begin + len(header)] = header
            _repair_checksum(buffer[begin:end], len(header), next_header)
        else:
            length = _inner_length(buffer[begin:end], next_header)
            if length is None:
                return self._traffic.drop(DropReason.ESP_MALFORMED)
            end = begin + length
        admission = self._admit(entry, buffer[begin:end])
        if admission.reason is not None:
            return self._traffic.drop(admission.reason)
        buffer[begin - _BEGIN : begin] = virtio.NO_OFFLOAD
        self._write(admission, buffer[begin - _BEGIN :], end - begin + _BEGIN, now)

    def _deliver_labelled(self, entry: SaEntry, tunnel: Tunnel, buffer: memoryview, begin: int, end: int, next_header: int, labels: Inside, now: float) -> None:
        admission = self._admit_labelled(entry, tunnel, buffer[begin:end], next_header, labels)
        if admission.reason is not None:
            return self._traffic.drop(admission.reason)
        if admission.landing is None:
            return self._labels.take(tunnel, buffer[begin + labels.stack : begin + labels.end], now)
        begin, end = begin + labels.inner, begin + labels.end
        with suppress(Malformed):
            end = begin + layout(buffer[begin:end]).length
        buffer[begin - _BEGIN : begin] = virtio.NO_OFFLOAD
        self._write(admission, buffer[begin - _BEGIN :], end - begin + _BEGIN, now)

    def _admit_labelled(self, entry: SaEntry, tunnel: Tunnel, payload: memoryview, next_header: int, labels: Inside) -> Admission:
        """The SA's selectors and the SPD see the tunnel's packet, the landing is that of the packet under the labels."""
        outer = payload
        if entry.sa.mode is Mode.TRANSPORT:
            outer = memoryview(self._prefix(entry, next_header, len(payload)) + payload)
        admission = self._admit(entry, outer)
        if admission.reason is not None or labels.inner == labels.stack:
            return admission
        landing = self._labels.land(tunnel, entry.tag, bytes(payload[labels.stack : labels.inner]), payload[labels.inner : labels.end])
        return Admission(None, landing=landing)

    def _deliver_rows(self, entry: SaEntry, rows: Rows, count: int, tail: tuple[SaEntry, int, int] | None, now: float) -> None:
        """Deliver the first `count` rows, then the packet in `_single` that `tail` tells of."""
        begin, flows = 0, 0
        while begin < count:
            joinable = self._joinable(entry, rows.plaintext_views[begin]) if flows < FLOWS_IN_ROWS else None
            if joinable is None:
                self._deliver_row(entry, rows.plaintext_views[begin], now)
                begin += 1
                continue
            flows += 1
            form, before, until = joinable.form, joinable.before, count
            if before:
                alike = (rows.plaintext[begin:count, :before] == rows.plaintext[begin, :before]).all(1)
                until = count if alike.all() else begin + int(alike.argmin())
            for start, stop in runs(form, rows.plaintext[begin:until, before:], rows.words[begin:until, before >> 2 :]):
                last = tail if begin + stop == count else None
                if self._deliver_run(entry, joinable, rows, begin + start, begin + stop, last, now):
                    tail = None
            begin += stop
        if tail is not None:
            self._deliver_one(*tail, now)

    def _joinable(self, entry: SaEntry, row: memoryview) -> Joinable | None:
        stripped = strip(row)
        if stripped is None:
            return None
        length, next_header = stripped
        form = None
        if entry.tunnel is not None:
            try:
                labels = inside(entry.tunnel, entry.sa, row[:length], next_header)
            except NotLabels:
                return None
            if labels is not None:
                return self._joinable_labelled(entry, entry.tunnel, row[:length], next_header, labels)
        if entry.sa.mode is Mode.TRANSPORT:
            form = format_of(row, length, self._prefix(entry, next_header, length), udp=self._udp_segmentation)
        elif length and row[0] >> 4 == _VERSION.get(next_header):
            form = format_of(row, length, udp=self._udp_segmentation)
        return Joinable(form) if form is not None else None

    def _joinable_labelled(self, entry: SaEntry, tunnel: Tunnel, payload: memoryview, next_header: int, labels: Inside) -> Joinable | None:
        packet = payload[labels.inner : labels.end]
        form = format_of(packet, len(packet), udp=self._udp_segmentation) if len(packet) > IPV4_HEADER and labels.end == len(payload) else None
        admission = self._admit_labelled(entry, tunnel, payload, next_header, labels) if form is not None else None
        if form is None or admission is None or admission.landing is None:
            return None
        return Joinable(form, labels.inner, bytes(payload[labels.stack : labels.inner]), admission)

    def _deliver_run(self, entry: SaEntry, joinable: Joinable, rows: Rows, start: int, stop: int, tail: tuple[SaEntry, int, int] | None, now: float) -> bool:
        """Join rows to one super-packet, or to the one that waits; whether the packet in `_single` went along."""
        form, before, admission = joinable.form, joinable.before, joinable.admission
        row = rows.plaintext_views[start][before : before + form.length]
        if admission is None:
            admission = self._admit(entry, memoryview(form.prefix + row) if form.prefix else row)
        if admission.reason is not None:
            self._traffic.drop(admission.reason, stop - start)
            return False
        rows_of_run = rows.plaintext[start:stop, before:]
        if stop - start == 1 and not verifies(form, row):
            self._deliver_row(entry, rows.plaintext_views[start], now)
            return False
        if self._open is None or self._open[0] is not entry or self._open[1].landing != admission.landing or not self._joiner.extend(form, rows_of_run):
            self.flush(now)
            self._joiner.begin(form, rows_of_run)
            self._open = entry, admission
        joined = False
        if tail is not None and tail[0] is entry and tail[2] == rows.plaintext[start, -1]:
            begin = _BEGIN + _PREFIX_ROOM
            if before:
                begin = self._under_same_labels(entry, joinable, begin, tail)
            joined = begin > 0 and self._joiner.append(self._single[begin : tail[1]])
        if self._joiner.complete:
            self.flush(now)
        return joined

    def _under_same_labels(self, entry: SaEntry, joinable: Joinable, begin: int, tail: tuple[SaEntry, int, int]) -> int:
        """Where in `_single` the packet under the labels begins; 0 when the labels are others."""
        assert entry.tunnel is not None
        payload = self._single[begin : tail[1]]
        try:
            labels = inside(entry.tunnel, entry.sa, payload, tail[2])
        except NotLabels:
            return 0
        alike = labels is not None and labels.inner == joinable.before and payload[labels.stack : labels.inner] == joinable.stack
        return begin + joinable.before if alike else 0

    def _deliver_row(self, entry: SaEntry, row: memoryview, now: float) -> None:
        stripped = strip(row)
        if stripped is None:
            return self._traffic.drop(DropReason.ESP_MALFORMED)
        length, next_header = stripped
        if next_header == NO_NEXT_HEADER:
            return self._traffic.drop(DropReason.DUMMY)
        begin = _BEGIN + _PREFIX_ROOM
        self._row[begin : begin + length] = row[:length]
        self._deliver_packet(entry, self._row, begin, begin + length, next_header, now)

    def _prefix(self, entry: SaEntry, next_header: int, length: int) -> bytes:
        """The IP header of a transport mode packet: the addresses of the SA, for those of the outer header may be a NAT's."""
        sa = entry.sa
        return build_header(sa.source.version, sa.source.packed, sa.destination.packed, next_header, length, traffic_class=self._outer)

    # 7. Admit

    def _admit(self, entry: SaEntry, packet: memoryview) -> Admission:
        """RFC 4301 section 5.2 step 4, for one flow out of one SA."""
        key = self._keys.cut(packet, 0)
        if key is None:
            return Admission(self._keys.reason)
        name = entry.tag + key
        admission = self._cache.get(name)
        if admission is None:
            full = self._keys.full_key(packet, 0)
            if full is None:
                return Admission(self._keys.reason)
            admission = self._decide(entry, full)
            self._cache.put(name, admission)
        return admission

    def _decide(self, entry: SaEntry, full: bytes) -> Admission:
        flow, sa = flow_of_key(full), entry.sa
        if not covers(sa, flow):
            return Admission(DropReason.SELECTOR_MISMATCH)
        reason = self._spd.check_inbound(full, sa.reqid, Direction.IN)
        if reason is not None and self._spd.check_inbound(full, sa.reqid, Direction.FORWARD) is not None:
            return Admission(reason)
        onward = self._spd.lookup_key(Direction.OUT, full)
        # Into the tunnel that it came out of it does not go back: that is a policy for everything, and the host's to route.
        if onward is not None and onward.action is Action.PROTECT and onward.templates[0].reqid != sa.reqid:
            return Admission(None, onward=True)
        return Admission(None)

    # 8. Write

    def flush(self, now: float) -> None:
        """Write the super-packet that waits for its flow to go on."""
        if self._open is not None:
            (_, admission), self._open = self._open, None
            length = len(self._joiner.frame())
            self._write(admission, self._joiner.buffer, length, now)

    def _write(self, admission: Admission, buffer: memoryview, length: int, now: float) -> None:
        self.flush(now)  # what came before leaves before
        landing, origin = admission.landing, None
        if landing is not None:
            self._labels.finish(landing, buffer[_BEGIN:length])
            if not landing.again:
                self._traffic.in_writes += 1
                return self._sink.write_vrf(landing.vrf, buffer[:length])
            origin = self._labels.vrf(landing.vrf)
        elif not admission.onward:
            self._traffic.in_writes += 1
            return self._sink.write_tun(buffer[:length])
        if not decrement_ttl(buffer[_BEGIN:length]):
            self._traffic.drop(DropReason.TTL_EXPIRED)
            return self._outbound.errors.time_exceeded(buffer[:length], now, origin)
        self._traffic.hairpinned += 1
        self._outbound.take(buffer, length, now, origin)


def _inner_length(packet: memoryview, next_header: int) -> int | None:
    """The length of a tunnelled packet without TFC padding (RFC 4303 section 2.7); None when it is none or cut off."""
    if next_header == PROTOCOL_IPIP:
        if len(packet) < IPV4_HEADER or packet[0] >> 4 != 4:
            return None
        length = packet[2] << 8 | packet[3]
    elif next_header == PROTOCOL_IPV6:
        if len(packet) < IPV6_HEADER or packet[0] >> 4 != 6:
            return None
        length = IPV6_HEADER + (packet[4] << 8 | packet[5])
    else:
        return None
    return length if IPV4_HEADER <= length <= len(packet) else None


def _repair_checksum(packet: memoryview, upper: int, protocol: int) -> None:
    """RFC 3948 section 3.1.2: a NAT changed the addresses under the transport checksum, which the peer that sealed the packet had computed."""
    field = upper + CHECKSUM_FIELDS.get(protocol, len(packet))
    if field + 2 > len(packet) or (protocol == PROTOCOL_UDP and not (packet[field] or packet[field + 1])):
        return
    if (partial_sum(packet[upper:]) + pseudo_header_sum(address_bytes(packet), protocol, len(packet) - upper)) % 0xFFFF:
        finish_checksum(packet, upper, protocol)
