"""The way of a packet from the TUN into an ESP datagram.

1. `take`       the frame: finish its checksum, or read it as a super-packet; cut its flow key
2. `_wait_behind`  a flow that has packets waiting gets this one behind them
3. resolve      bundle cache; on a miss SPD and SAD, and a new bundle (`resolution`)
4. `_unresolved` no SA: wait and ask for one, or be dropped with a reason
5. `_protect`   transport mode joins fragments first; the path's MTU: too big, or fragments
6. seal         single packets, or rows of a super-packet: sequence numbers, sealing, out (`sealing`)

`drain` takes packets that waited through 3, 5 and 6 when their SA came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from kernel_shim.dataplane.bundle import Bundle, Cover, Held
from kernel_shim.dataplane.errors import Errors
from kernel_shim.dataplane.origin import Origin
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.resolution import Resolution, Wanted
from kernel_shim.dataplane.sealing import TAIL_ROOM, Sealing
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.model import Acquire, Action, Level, Unresolved
from kernel_shim.packet import virtio
from kernel_shim.packet.fragment import fragments
from kernel_shim.packet.icmp import IcmpError
from kernel_shim.packet.ip import IPV4_HEADER, IPV6_SMALLEST_MTU, LARGEST_PACKET, Malformed, fragmented, layout
from kernel_shim.packet.reassembly import Reassembler
from kernel_shim.packet.segment import SuperPacket, complete_checksum, read_super, segment, segments
from kernel_shim.packet.virtio import VnetHeader
from kernel_shim.policy.acquire import AcquireTable, Need
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import FlowKeys
from kernel_shim.policy.peer import PeerKey
from kernel_shim.policy.pending import Dropped, PendingQueues, Run
from kernel_shim.reasons import DropReason
from kernel_shim.sa.database import Sad

_BEGIN: Final = virtio.LENGTH


class Outbound:
    def __init__(
        self,
        sink: Sink,
        traffic: Traffic,
        sad: Sad,
        keys: FlowKeys,
        cache: BundleCache[Bundle],
        pending: PendingQueues[Held],
        acquires: AcquireTable,
        resolution: Resolution,
        emit: Callable[[Acquire], None],
    ) -> None:
        self._sink, self._traffic, self._sad = sink, traffic, sad
        self._keys, self._cache, self._pending, self._acquires = keys, cache, pending, acquires
        self._resolution, self._emit = resolution, emit
        self._sealing: Final = Sealing(sink, traffic, sad)
        self.batches: Final = self._sealing.batches
        self.errors: Final = Errors(sink, traffic)
        self._scratch: Final = memoryview(bytearray(_BEGIN + LARGEST_PACKET + TAIL_ROOM))
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
            found = self._resolution.resolve(key, view, origin)
            if isinstance(found, Wanted):
                return self._unresolved(found, key, view, big, now, origin)
            if found is None:
                self._traffic.drop(keys.reason, big.segments if big else 1)
                return self.errors.unreachable(view, now, origin) if keys.reason is DropReason.MPLS_NO_ROUTE else None
            bundle = found
        self._go(bundle, frame, length, big, now, origin)

    def _wait_behind(self, key: bytes, view: memoryview, big: SuperPacket | None, now: float, origin: Origin | None) -> None:
        count = big.segments if big else 1
        reason = self._pending.join(key, Held(bytes(view), count, origin), len(view), count, now)
        if reason is not None:
            self.errors.unreachable(view, now, origin)

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
            return self.errors.unreachable(view, now, origin)
        reason = self._pending.offer(wanted.peer, key, Held(bytes(view), count, origin), len(view), count, policy.unresolved, now)
        if reason is not None and reason is not DropReason.UNRESOLVED_DROP:
            self.errors.unreachable(view, now, origin)

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
            found = self._resolution.resolve(key, held.frame, held.origin) if key is not None else None
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
                self.errors.tell(IcmpError.TOO_BIG, memoryview(piece), now, bundle.limit, origin)
                continue
            self._sink.bypass(memoryview(virtio.NO_OFFLOAD + cover.before(piece, len(piece)) + bytes(piece)))

    def _protect(self, bundle: Bundle, frame: memoryview, length: int, big: SuperPacket | None, now: float, origin: Origin | None) -> None:
        entry = bundle.entry
        assert entry is not None
        if bundle.transport and not big and fragmented(frame[_BEGIN:length]):
            # RFC 4303 section 3.1.1: transport mode takes whole datagrams.
            whole = self._apart.take(frame[_BEGIN:length], layout(frame[_BEGIN:length]), now)
            self.count_fragments_lost()
            return self._seal(bundle, (whole,), now) if whole is not None else None
        size = big.segment_length if big else length - _BEGIN
        if size > bundle.limit:
            return self._too_big(bundle, frame, length, big, now, origin)
        if not entry.room(big.segments if big else 1):
            self._sad.expire_hard(entry)
            return self.take(frame, length, now, origin)
        if big and bundle.padded > big.segment_length:
            self._seal(bundle, tuple(segments(big)), now)
        elif big:
            self._sealing.big(bundle, entry, big, now)
        elif bundle.cover is not None:
            self._seal(bundle, (frame[_BEGIN:length],), now)
        else:
            self._sealing.one(bundle, entry, frame, _BEGIN, length, now)

    def _seal(self, bundle: Bundle, pieces: Sequence[bytearray | memoryview], now: float) -> None:
        for done, piece in enumerate(pieces):
            if not self._sealing.piece(bundle, piece, now):
                return self._traffic.drop(DropReason.SA_EXHAUSTED, len(pieces) - done)

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
            return self.errors.tell(IcmpError.TOO_BIG, packet, now, bundle.limit if parsed.version == 4 else max(bundle.limit, IPV6_SMALLEST_MTU), origin)
        for datagram in segments(big) if big else (packet,):
            if sealed_whole:
                self._seal(bundle, (datagram,), now)
                continue
            pieces = tuple(fragments(datagram, layout(datagram), bundle.limit))
            self._traffic.fragments_made += len(pieces)
            self._seal(bundle, pieces, now)

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
        found: Bundle | Wanted | None = bundle if bundle is not None else self._resolution.resolve(run.flow, frame, origin)
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
            if asked is None or not found.policy.templates or self._resolution.select(found.policy.templates[0], asked) is not None:
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
            self.errors.unreachable(memoryview(item.packet.frame), now, item.packet.origin)
