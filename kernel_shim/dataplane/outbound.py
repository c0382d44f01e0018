"""The way of a packet from the TUN into an ESP datagram.

1. `take`       the frame: finish its checksum, or read it as a super-packet; cut its flow key
2. `_waits`     a flow that has packets waiting gets this one behind them
3. `_resolve`   bundle cache; on a miss SPD and SAD, and a new bundle
4. `_unresolved` no SA: wait and ask for one, or be dropped with a reason
5. `_protect`   transport mode joins fragments first; the path's MTU: too big, or fragments; then single packets or rows of a super-packet
6. `_seal_one`, `_seal_super`  sequence numbers, sealing, out

`drain` takes packets that waited through 3, 5 and 6 when their SA came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kernel_shim.dataplane.batch import Batches
from kernel_shim.dataplane.bundle import Bundle, Cover, Held, payload_limit, protect
from kernel_shim.dataplane.mtu import PathMtus
from kernel_shim.dataplane.origin import LARGEST_COVER, Carried, LabelCover, Origin
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.esp.rows import MAX_DATAGRAMS, MAX_ROWS, Workspace
from kernel_shim.esp.wire import trailer
from kernel_shim.model import Acquire, Action, Direction, Flow, Level, Mode, Policy, SaState, Template, Unresolved
from kernel_shim.mpls.lfib import ToInterface
from kernel_shim.mpls.node import LabelNode
from kernel_shim.packet import virtio
from kernel_shim.packet.fragment import fragments
from kernel_shim.packet.icmp import IcmpError, RateLimit, error_packet
from kernel_shim.packet.ip import IPV4_HEADER, IPV6_HEADER, IPV6_SMALLEST_MTU, PROTOCOL_IPIP, PROTOCOL_IPV6, Malformed, fragmented, layout
from kernel_shim.packet.reassembly import Reassembler
from kernel_shim.packet.segment import SuperPacket, complete_checksum, fill_rows, read_super, segment, segments
from kernel_shim.packet.traffic_class import DSCP, traffic_class
from kernel_shim.packet.virtio import VnetHeader
from kernel_shim.policy.acquire import AcquireTable, Need
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import FlowKeys, flow_of_key, key_of_flow
from kernel_shim.policy.peer import PeerKey, peer_of
from kernel_shim.policy.pending import Dropped, PendingQueues, Run
from kernel_shim.policy.spd import SecurityPolicyDatabase
from kernel_shim.reasons import DropReason
from kernel_shim.sa.database import Sad, covers
from kernel_shim.sa.entry import SaEntry

ESTIMATED_OVERHEAD: Final = 84  # octets: IPv6, UDP, ESP with IV and ICV, as long as nobody knows better
TAIL_ROOM: Final = 32  # bytes behind a frame that sealing in place may write: the longest ESP trailer is 17

_BEGIN: Final = virtio.LENGTH
_NEXT_HEADER: Final = {4: PROTOCOL_IPIP, 6: PROTOCOL_IPV6}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A protected flow without an SA."""

    policy: Policy
    template: Template
    flow: Flow

    @property
    def peer(self) -> PeerKey:
        return peer_of(self.policy, self.template, self.flow)


class Outbound:
    def __init__(
        self,
        sink: Sink,
        traffic: Traffic,
        spd: SecurityPolicyDatabase,
        sad: Sad,
        keys: FlowKeys,
        cache: BundleCache[Bundle],
        pending: PendingQueues[Held],
        acquires: AcquireTable,
        paths: PathMtus,
        node: LabelNode,
        emit: Callable[[Acquire], None],
    ) -> None:
        self._sink, self._traffic, self._spd, self._sad = sink, traffic, spd, sad
        self._keys, self._cache, self._pending, self._acquires = keys, cache, pending, acquires
        self._paths, self._node, self._emit = paths, node, emit
        self.batches: Final = Batches(sink, traffic)
        self._workspace: Final = Workspace()
        self._errors: Final = RateLimit()
        self._scratch: Final = memoryview(bytearray(_BEGIN + 65535 + TAIL_ROOM))
        self._piece: Final = memoryview(bytearray(65535 + LARGEST_COVER + TAIL_ROOM))
        self._padded: Final = memoryview(bytearray(65535 + TAIL_ROOM))
        self._apart: Final = Reassembler()

    # 1. Take

    def take(self, frame: memoryview, length: int, now: float, origin: Origin | None = None) -> None:
        """`frame` is writable and has TAIL_ROOM bytes behind `length`; it is free again on return. `origin` None: from the host's TUN."""
        view = frame[:length]
        big: SuperPacket | None = None
        if length < _BEGIN + IPV4_HEADER:
            return self._traffic.drop(DropReason.HEADER_TRUNCATED)
        if view[1]:
            try:
                big = read_super(VnetHeader.unpack(view), view[_BEGIN:])
            except Malformed:
                return self._traffic.drop(DropReason.OFFLOAD_INVALID)
        elif view[0] & virtio.NEEDS_CHECKSUM:
            if not complete_checksum(VnetHeader.unpack(view), view[_BEGIN:]):
                return self._traffic.drop(DropReason.OFFLOAD_INVALID)
            view[0] = 0
        keys = self._keys if origin is None else origin
        key = keys.cut(view, _BEGIN)
        if key is None:
            return self._traffic.drop(keys.reason, big.segments if big else 1)
        # 2. Waits
        if self._pending.flows and key in self._pending.flows:
            return self._wait_behind(key, view, big, now, origin)
        bundle = self._cache.get(key)
        if bundle is None:
            found = self._resolve(key, view, origin)
            if isinstance(found, Wanted):
                return self._unresolved(found, key, view, big, now, origin)
            if found is None:
                self._traffic.drop(keys.reason, big.segments if big else 1)
                return self._unreachable(view, now, origin) if keys.reason is DropReason.MPLS_NO_ROUTE else None
            bundle = found
        self._go(bundle, frame, length, big, now, origin)

    def _wait_behind(self, key: bytes, view: memoryview, big: SuperPacket | None, now: float, origin: Origin | None) -> None:
        count = big.segments if big else 1
        reason = self._pending.join(key, Held(bytes(view), count, origin), len(view), count, now)
        if reason is not None:
            self._unreachable(view, now, origin)

    # 3. Resolve

    def _resolve(self, key: bytes, view: bytes | memoryview, origin: Origin | None = None) -> Bundle | Wanted | None:
        """A bundle, now in the cache; a wish for an SA; None when the packet cannot be looked up, the `reason` of keys or origin says why."""
        if origin is not None:
            return self._resolve_labelled(key, memoryview(view)[_BEGIN:], origin)
        full = self._keys.full_key(view, _BEGIN)
        if full is None:
            return None
        policy = self._spd.lookup_key(Direction.OUT, full)
        if policy is None or policy.action is Action.BYPASS:
            # What no policy names is here only because it shares a capture route with what one does.
            bundle = Bundle(Action.BYPASS, policy)
        elif policy.action is Action.DISCARD:
            bundle = Bundle(Action.DISCARD, policy)
        else:
            template, flow = policy.templates[0], flow_of_key(full)
            entry = self.select(template, flow)
            if entry is None:
                return Wanted(policy, template, flow)
            bundle = protect(policy, entry, self._paths, flow.source.version)
        self._cache.put(key, bundle)
        return bundle

    def _resolve_labelled(self, key: bytes, packet: memoryview, origin: Origin) -> Bundle | Wanted | None:
        """A label tunnel is a flow like any other to the SPD; in clear it goes only through a managed network."""
        carried = origin.carry(packet)
        if carried is None:
            return None
        if isinstance(carried, ToInterface):
            bundle = Bundle(Action.BYPASS, None, landing=carried.vrf)
        else:
            found = self.tunnel_sa(carried)
            if isinstance(found, Wanted):
                return found
            policy, entry = found
            if entry is not None:
                assert policy is not None
                cover = LabelCover(self._node.forwarder, carried.tunnel, carried.path, carried.number, entry.sa.mode)
                limit = min(payload_limit(entry, self._paths) - cover.length, 65535 - cover.length)
                bundle = Bundle(Action.PROTECT, policy, entry, limit, cover)
            elif carried.tunnel.managed and (policy is None or policy.action is Action.BYPASS):
                cover = LabelCover(self._node.forwarder, carried.tunnel, carried.path, carried.number, Mode.TUNNEL)
                bundle = Bundle(Action.BYPASS, policy, limit=self._paths.get(carried.tunnel.local, carried.tunnel.remote) - cover.length, cover=cover)
            else:
                bundle = Bundle(Action.DISCARD, policy)
        self._cache.put(key, bundle)
        return bundle

    def tunnel_sa(self, carried: Carried) -> tuple[Policy | None, SaEntry | None] | Wanted:
        """The policy for a tunnel's packets, and its SA."""
        flow = carried.flow
        policy = self._spd.lookup_key(Direction.OUT, key_of_flow(flow))
        if policy is None or policy.action is not Action.PROTECT:
            return policy, None
        entry = self.select(policy.templates[0], flow)
        return (policy, entry) if entry is not None else Wanted(policy, policy.templates[0], flow)

    def tunnel_limit(self, carried: Carried) -> int:
        """The longest stack with payload that fits a tunnel, in octets; an estimate while it has no SA."""
        tunnel = carried.tunnel
        found = self.tunnel_sa(carried)
        entry = None if isinstance(found, Wanted) else found[1]
        mode = Mode.TRANSPORT if entry is not None and entry.sa.mode is Mode.TRANSPORT else Mode.TUNNEL
        room = payload_limit(entry, self._paths) if entry is not None else self._paths.get(tunnel.local, tunnel.remote) - ESTIMATED_OVERHEAD
        return room - LabelCover(self._node.forwarder, tunnel, carried.path, carried.number, mode).length

    def select(self, template: Template, flow: Flow) -> SaEntry | None:
        """The newest mature SA that the template asks for and that covers the flow; a dying one when there is no other."""
        destination = template.destination or flow.destination
        dying = None
        for entry in reversed(self._sad.outbound(template.reqid) if template.reqid else self._sad.outbound_all()):
            sa = entry.sa
            if sa.mode is not template.mode or sa.destination != destination or (template.source or sa.source) != sa.source or not covers(sa, flow):
                continue
            if entry.state is SaState.MATURE:
                return entry
            if dying is None and entry.usable:
                dying = entry
        return dying

    # 4. Unresolved

    def _unresolved(self, wanted: Wanted, key: bytes, view: memoryview, big: SuperPacket | None, now: float, origin: Origin | None) -> None:
        count = big.segments if big else 1
        policy = wanted.policy
        need = self._ask(wanted, now)
        if wanted.template.level is Level.USE and origin is None:
            self._traffic.bypassed += count
            return self._sink.bypass(view)
        if policy.unresolved is not Unresolved.BLOCK and need in (Need.BACKING_OFF, Need.TABLE_FULL):
            self._traffic.drop(DropReason.ACQUIRE_BACKOFF if need is Need.BACKING_OFF else DropReason.ACQUIRE_TABLE_FULL, count)
            return self._unreachable(view, now, origin)
        reason = self._pending.offer(wanted.peer, key, Held(bytes(view), count, origin), len(view), count, policy.unresolved, now)
        if reason is not None and reason is not DropReason.UNRESOLVED_DROP:
            self._unreachable(view, now, origin)

    def _ask(self, wanted: Wanted, now: float) -> Need:
        need, acquire = self._acquires.need(wanted.peer, wanted.policy, wanted.template, wanted.flow, now)
        if acquire is not None:
            self._emit(acquire)
        return need

    def ask_again(self, peer: PeerKey, now: float) -> None:
        """A peer may be asked for again, and packets still wait for it."""
        held = self._pending.head(peer)
        if held is not None:
            key = self.key_of(held)
            found = self._resolve(key, held.frame, held.origin) if key is not None else None
            if isinstance(found, Wanted):
                self._ask(found, now)
            else:
                self._pending.ready(peer)

    def key_of(self, held: Held) -> bytes | None:
        """The flow key of a packet that waits, as keys are cut now."""
        return (self._keys if held.origin is None else held.origin).cut(held.frame, _BEGIN)

    # 5. Protect

    def _go(self, bundle: Bundle, frame: memoryview, length: int, big: SuperPacket | None, now: float, origin: Origin | None = None) -> None:
        if bundle.action is Action.PROTECT:
            return self._protect(bundle, frame, length, big, now, origin)
        count = big.segments if big else 1
        if bundle.action is Action.DISCARD:
            return self._traffic.drop(DropReason.POLICY_DISCARD, count)
        if bundle.landing is not None:
            return self._sink.write_vrf(bundle.landing, frame[:length])
        self._traffic.bypassed += count
        if bundle.cover is not None:
            return self._bypass_labelled(bundle, bundle.cover, frame[_BEGIN:length], big, now, origin)
        self._sink.bypass(frame[:length])

    def _bypass_labelled(self, bundle: Bundle, cover: Cover, packet: memoryview, big: SuperPacket | None, now: float, origin: Origin | None) -> None:
        """Through a managed network, packet by packet."""
        for piece in segments(big) if big else (packet,):
            if len(piece) > bundle.limit:
                self._traffic.drop(DropReason.MPLS_TOO_BIG)
                self._tell(IcmpError.TOO_BIG, memoryview(piece), now, bundle.limit, origin)
                continue
            self._sink.bypass(memoryview(virtio.NO_OFFLOAD + cover.before(piece, len(piece)) + bytes(piece)))

    def _protect(self, bundle: Bundle, frame: memoryview, length: int, big: SuperPacket | None, now: float, origin: Origin | None) -> None:
        entry = bundle.entry
        assert entry is not None
        if bundle.transport and not big and fragmented(frame[_BEGIN:length]):
            # RFC 4303 section 3.1.1: transport mode takes whole datagrams.
            whole = self._apart.take(frame[_BEGIN:length], layout(frame[_BEGIN:length]), now)
            self.count_fragments_lost()
            if whole is not None:
                self._seal_piece(bundle, whole, now)
            return
        size = big.segment_length if big else length - _BEGIN
        if size > bundle.limit:
            return self._too_big(bundle, frame, length, big, now, origin)
        if not entry.room(big.segments if big else 1):
            self._sad.expire_hard(entry)
            return self.take(frame, length, now, origin)
        if big and bundle.padded > big.segment_length:
            for piece in segments(big):
                if not self._seal_piece(bundle, piece, now):
                    return
        elif big:
            self._seal_super(bundle, entry, big, now)
        elif bundle.cover is not None:
            self._seal_piece(bundle, frame[_BEGIN:length], now)
        else:
            self._seal_one(bundle, entry, frame, _BEGIN, length, now)

    def _too_big(self, bundle: Bundle, frame: memoryview, length: int, big: SuperPacket | None, now: float, origin: Origin | None) -> None:
        """RFC 4301 section 8.2: tell the sender, or fragment what may be fragmented: before sealing, or the sealed packet."""
        packet = frame[_BEGIN:length]
        try:
            parsed = layout(packet)
        except Malformed:
            return self._traffic.drop(DropReason.HEADER_INVALID)
        size = big.segment_length if big else parsed.length
        # RFC 8200 section 5: below 1280 bytes a link cuts and joins by itself. RFC 4303 section 3.1.1: transport mode takes whole datagrams.
        sealed_whole = size <= IPV6_SMALLEST_MTU if parsed.version == 6 else bundle.transport and not parsed.dont_fragment
        if not sealed_whole and parsed.dont_fragment:
            if big:
                packet = memoryview(segment(big, 0, big.segments - 1))
            self._traffic.drop(DropReason.TOO_BIG, big.segments if big else 1)
            return self._tell(IcmpError.TOO_BIG, packet, now, bundle.limit if parsed.version == 4 else max(bundle.limit, IPV6_SMALLEST_MTU), origin)
        for datagram in segments(big) if big else (packet,):
            for piece in (datagram,) if sealed_whole else fragments(datagram, layout(datagram), bundle.limit):
                self._traffic.fragments_made += not sealed_whole
                if not self._seal_piece(bundle, piece, now):
                    return

    def _seal_piece(self, bundle: Bundle, piece: bytearray | memoryview, now: float) -> bool:
        """Seal a packet that is elsewhere; one over the path's MTU travels in fragments. False when the SA is used up."""
        entry = bundle.entry
        assert entry is not None
        assert entry.cipher is not None
        if not entry.room(1) or not entry.usable:
            self._sad.expire_hard(entry)
            self._traffic.drop(DropReason.TOO_BIG)
            return False
        length, cover = len(piece), b"" if bundle.cover is None else bundle.cover.before(piece, len(piece))
        whole = len(cover) + length
        if entry.cipher.shape.sealed(whole) > MAX_DATAGRAMS:
            self._traffic.drop(DropReason.TOO_BIG)
            return True
        self._piece[: len(cover)] = cover
        self._piece[len(cover) : whole] = piece
        if length <= bundle.limit:
            self._seal_one(bundle, entry, self._piece, 0, whole, now)
        else:
            self.batches.flush(entry)
            self._seal_one(bundle, entry, self._piece, 0, whole, now)
            self.batches.flush_in_fragments(entry)
        return True

    # 6. Seal

    def _seal_one(self, bundle: Bundle, entry: SaEntry, frame: memoryview, begin: int, end: int, now: float) -> None:
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

    def _seal_super(self, bundle: Bundle, entry: SaEntry, big: SuperPacket, now: float) -> None:
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
                end = self._seal_rest(bundle, entry, big, strip, next_header, wire, end)
                done = total
            for begin in range(0, end, at_once):
                self._traffic.out_sends += 1
                self._sink.send_esp(entry.local, entry.remote, wire[begin : min(begin + at_once, end)], size, whole=whole, traffic_class=outer_class)
        octets = len(big.packet) - big.header + total * (before + big.header - strip)
        self._traffic.out_packets += total
        self._traffic.out_octets += octets
        self._sad.charge(entry, total, octets, now)

    def _seal_rest(self, bundle: Bundle, entry: SaEntry, big: SuperPacket, strip: int, next_header: int, wire: memoryview, begin: int) -> int:
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

    # Fragments in transport mode

    def count_fragments_lost(self, now: float | None = None) -> None:
        """With `now`, those that waited too long for the others as well."""
        if now is not None:
            self._apart.expire(now)
        if self._apart.lost:
            self._traffic.drop(DropReason.TRANSPORT_FRAGMENT, self._apart.lost)
            self._apart.lost = 0

    # Packets that waited

    def drain(self, now: float) -> bool:
        """Work off one slice of what waits for an SA that came; whether there is more."""
        run = self._pending.next_run()
        if run is None:
            return False
        frame = run.packets[0].frame
        bundle = self._cache.get(run.flow)
        origin = run.packets[0].origin
        found: Bundle | Wanted | None = bundle if bundle is not None else self._resolve(run.flow, frame, origin)
        if found is None:
            self.lost(self._pending.drop(run, (self._keys if origin is None else origin).reason), now)
        elif isinstance(found, Wanted):
            self._ask(found, now)
            if found.peer == run.key:
                self._pending.keep(run)
            else:
                self._pending.move(run, found.peer, found.policy.unresolved)
        elif found.action is Action.DISCARD:
            self.lost(self._pending.drop(run, DropReason.POLICY_DISCARD), now)
        elif found.policy is None:
            # It waited because it was to be protected: that its policy is gone does not let it out in clear.
            self.lost(self._pending.drop(run, DropReason.PENDING_POLICY_GONE), now)
        else:
            asked = self._acquires.asked(run.key)
            # The ACQUIRE of this peer may by now be for a flow that the SA leaves out.
            if asked is None or not found.policy.templates or self.select(found.policy.templates[0], asked) is not None:
                self._acquires.resolved(run.key)
            self._send_run(run, found, now)
        return True

    def _send_run(self, run: Run[Held], bundle: Bundle, now: float) -> None:
        """All packets of the run, or as many as the SA's lifetime allows; the others come again."""
        entry = bundle.entry
        if entry is not None:
            fitting, segments_so_far = 0, 0
            for held in run.packets:
                segments_so_far += held.segments
                if not entry.room(segments_so_far):
                    break
                fitting += 1
            if not fitting:
                return self._sad.expire_hard(entry)
            run = Run(run.key, run.flow, run.packets[:fitting], run.waiting[:fitting])
        for held in self._pending.take(run):
            length = len(held.frame)
            self._scratch[:length] = held.frame
            big = read_super(VnetHeader.unpack(held.frame), self._scratch[_BEGIN:length]) if held.frame[1] else None
            self._go(bundle, self._scratch, length, big, now, held.origin)

    def lost(self, dropped: list[Dropped[Held]], now: float) -> None:
        """Tell the senders of packets that waited in vain."""
        for item in dropped:
            self._unreachable(memoryview(item.packet.frame), now, item.packet.origin)

    # ICMP

    def _unreachable(self, view: memoryview, now: float, origin: Origin | None = None) -> None:
        self._tell(IcmpError.HOST_UNREACHABLE, view[_BEGIN:], now, 0, origin)

    def tell_time_exceeded(self, view: memoryview, now: float, origin: Origin | None = None) -> None:
        self._tell(IcmpError.TIME_EXCEEDED, view[_BEGIN:], now, 0, origin)

    def _tell(self, error: IcmpError, packet: memoryview, now: float, mtu: int = 0, origin: Origin | None = None) -> None:
        try:
            parsed = layout(packet)
        except Malformed:
            return
        message = error_packet(error, packet, parsed, mtu)
        if message is None or not self._errors.allow(now):
            self._traffic.icmp_suppressed += 1
            return
        self._traffic.icmp_errors += 1
        frame = memoryview(virtio.NO_OFFLOAD + message)
        if origin is None:
            self._sink.write_tun(frame)
        else:
            origin.tell(frame)
