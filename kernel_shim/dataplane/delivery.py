"""From an opened ESP packet to where it belongs: the host's TUN, a VRF's interface, or another tunnel.

1. `one`, `rows`, `row`  padding, next header; in transport mode a new IP header; labels are looked through
2. `_admit`       the SA's own selectors and the inbound SPD, remembered by flow and SA
3. `_write`       joined with its neighbours, to the TUN, or straight into another tunnel
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kernel_shim.dataplane.labels import Inside, Labels, Landing, inside
from kernel_shim.dataplane.outbound import Outbound
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.sealing import TAIL_ROOM
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.esp.rows import Rows
from kernel_shim.esp.wire import strip
from kernel_shim.model import Action, Direction, Mode
from kernel_shim.mpls.encapsulation import NotLabels
from kernel_shim.mpls.node import Tunnel
from kernel_shim.packet import virtio
from kernel_shim.packet.checksum import partial_sum, pseudo_header_sum
from kernel_shim.packet.coalesce import Format, Joiner, format_of, runs, verifies
from kernel_shim.packet.ip import (
    IPV4_HEADER,
    IPV6_HEADER,
    LARGEST_PACKET,
    NO_NEXT_HEADER,
    PROTOCOL_IPIP,
    PROTOCOL_IPV6,
    PROTOCOL_UDP,
    address_bytes,
    build_header,
    decrement_ttl,
)
from kernel_shim.packet.segment import CHECKSUM_FIELDS, finish_checksum
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import FlowKeys, flow_of_key
from kernel_shim.policy.spd import SecurityPolicyDatabase
from kernel_shim.reasons import DropReason
from kernel_shim.sa.database import covers
from kernel_shim.sa.entry import SaEntry

FLOWS_IN_ROWS: Final = 4  # of more flows than that in one receive the others are delivered one by one
PREFIX_ROOM: Final = IPV6_HEADER  # octets before an opened packet, for the header that transport mode gives back

_BEGIN: Final = virtio.LENGTH
PACKET: Final = _BEGIN + PREFIX_ROOM
VERSION_OF: Final = {PROTOCOL_IPIP: 4, PROTOCOL_IPV6: 6}


class Admission(NamedTuple):
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


class Delivery:
    """`single` is where one opened packet is put, at PACKET, before `one` delivers it."""

    def __init__(
        self,
        sink: Sink,
        traffic: Traffic,
        spd: SecurityPolicyDatabase,
        keys: FlowKeys,
        cache: BundleCache[Admission],
        outbound: Outbound,
        labels: Labels,
        *,
        udp_segmentation: bool,
    ) -> None:
        self._sink, self._traffic, self._spd = sink, traffic, spd
        self._keys, self._cache, self._outbound, self._labels = keys, cache, outbound, labels
        self._udp_segmentation = udp_segmentation
        self.single: Final = memoryview(bytearray(PACKET + LARGEST_PACKET + TAIL_ROOM))
        self._row: Final = memoryview(bytearray(PACKET + LARGEST_PACKET + TAIL_ROOM))
        self._joiner: Final = Joiner(TAIL_ROOM)
        self._open: tuple[SaEntry, Admission] | None = None  # whose packets the joiner holds
        self.outer = 0  # traffic class of the outer header of what is delivered; who opened it sets it

    # 1. Deliver

    def one(self, entry: SaEntry, end: int, next_header: int, now: float) -> None:
        """Deliver what `_open_one` left in `_single`, up to `end`."""
        begin = PACKET
        if next_header == NO_NEXT_HEADER:
            return self._traffic.drop(DropReason.DUMMY)
        self._deliver_packet(entry, self.single, begin, end, next_header, now)

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
        end = min(end, begin + _told_length(buffer[begin:end]))  # what can be landed has a header that can be read
        buffer[begin - _BEGIN : begin] = virtio.NO_OFFLOAD
        self._write(admission, buffer[begin - _BEGIN :], end - begin + _BEGIN, now)

    def _admit_labelled(self, entry: SaEntry, tunnel: Tunnel, payload: memoryview, next_header: int, labels: Inside) -> Admission:
        """The SA's selectors and the SPD see the tunnel's packet, the landing is that of the packet under the labels."""

        def admit() -> DropReason | None:
            outer = payload
            if entry.sa.mode is Mode.TRANSPORT:
                outer = memoryview(self._prefix(entry, next_header, len(payload)) + payload)
            return self._admit(entry, outer).reason

        if labels.inner == labels.stack:
            return Admission(admit())
        landing = self._labels.land(tunnel, entry.tag, payload, labels, admit)
        return Admission(landing) if isinstance(landing, DropReason) else Admission(None, landing=landing)

    def rows(self, entry: SaEntry, rows: Rows, count: int, tail: tuple[SaEntry, int, int] | None, now: float) -> None:
        """Deliver the first `count` rows, then the packet in `_single` that `tail` tells of."""
        begin, flows = 0, 0
        while begin < count:
            joinable = self._joinable(entry, rows.plaintext_views[begin]) if flows < FLOWS_IN_ROWS else None
            if joinable is None:
                self.row(entry, rows.plaintext_views[begin], now)
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
            self.one(*tail, now)

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
        elif length and row[0] >> 4 == VERSION_OF.get(next_header):
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
            self.row(entry, rows.plaintext_views[start], now)
            return False
        if self._open is None or self._open[0] is not entry or self._open[1].landing != admission.landing or not self._joiner.extend(form, rows_of_run):
            self.flush(now)
            self._joiner.begin(form, rows_of_run)
            self._open = entry, admission
        joined = False
        if tail is not None and tail[0] is entry and tail[2] == rows.plaintext[start, -1]:
            begin = PACKET
            if before:
                begin = self._under_same_labels(entry, joinable, begin, tail)
            joined = begin > 0 and self._joiner.append(self.single[begin : tail[1]])
        if self._joiner.complete:
            self.flush(now)
        return joined

    def _under_same_labels(self, entry: SaEntry, joinable: Joinable, begin: int, tail: tuple[SaEntry, int, int]) -> int:
        """Where in `_single` the packet under the labels begins; 0 when the labels are others."""
        assert entry.tunnel is not None
        payload = self.single[begin : tail[1]]
        try:
            labels = inside(entry.tunnel, entry.sa, payload, tail[2])
        except NotLabels:
            return 0
        alike = labels is not None and labels.inner == joinable.before and payload[labels.stack : labels.inner] == joinable.stack
        return begin + joinable.before if alike else 0

    def row(self, entry: SaEntry, row: memoryview, now: float) -> None:
        stripped = strip(row)
        if stripped is None:
            return self._traffic.drop(DropReason.ESP_MALFORMED)
        length, next_header = stripped
        if next_header == NO_NEXT_HEADER:
            return self._traffic.drop(DropReason.DUMMY)
        begin = PACKET
        self._row[begin : begin + length] = row[:length]
        self._deliver_packet(entry, self._row, begin, begin + length, next_header, now)

    def _prefix(self, entry: SaEntry, next_header: int, length: int) -> bytes:
        """The IP header of a transport mode packet: the addresses of the SA, for those of the outer header may be a NAT's."""
        sa = entry.sa
        return build_header(sa.source.version, sa.source.packed, sa.destination.packed, next_header, length, traffic_class=self.outer)

    # 2. Admit

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

    # 3. Write

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


def _told_length(packet: memoryview) -> int:
    """What an IP header says."""
    return packet[2] << 8 | packet[3] if packet[0] >> 4 == 4 else IPV6_HEADER + (packet[4] << 8 | packet[5])


def _inner_length(packet: memoryview, next_header: int) -> int | None:
    """The length of a tunnelled packet without TFC padding (RFC 4303 section 2.7); None when it is none or cut off."""
    if next_header == PROTOCOL_IPIP:
        if len(packet) < IPV4_HEADER or packet[0] >> 4 != 4:
            return None
    elif next_header == PROTOCOL_IPV6:
        if len(packet) < IPV6_HEADER or packet[0] >> 4 != 6:
            return None
    else:
        return None
    length = _told_length(packet)
    return length if IPV4_HEADER <= length <= len(packet) else None


def _repair_checksum(packet: memoryview, upper: int, protocol: int) -> None:
    """RFC 3948 section 3.1.2: a NAT changed the addresses under the transport checksum, which the peer that sealed the packet had computed."""
    field = upper + CHECKSUM_FIELDS.get(protocol, len(packet))
    if field + 2 > len(packet) or (protocol == PROTOCOL_UDP and not (packet[field] or packet[field + 1])):
        return
    if (partial_sum(packet[upper:]) + pseudo_header_sum(address_bytes(packet), protocol, len(packet) - upper)) % 0xFFFF:
        finish_checksum(packet, upper, protocol)
