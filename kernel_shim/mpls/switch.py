"""Labelled packets as bytes: the decisions of `forward`, carried out.

1. `from_vrf`   IP of a customer: stack on, or to another interface
2. `from_peer`  stack and payload of a peer: new stack, or IP that comes to light
3. `_fit`       the tunnel's limit: fragments of the IP payload, or an error to its sender
4. `_answer`    ICMP with the stack that met the error (RFC 4884, RFC 4950), along the LSP (RFC 3032 section 2.3.2)

The steady flow takes a shorter way with the same decisions: `kernel_shim.dataplane` remembers what `Forwarder` said.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple
from zlib import crc32

from kernel_shim.mpls.diffserv import ClassMap
from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import LARGEST_TTL, Entry, MalformedStack, read_stack, write_stack
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, ToVrf
from kernel_shim.packet.checksum import checksum, partial_sum
from kernel_shim.packet.fragment import SMALLEST_FRAGMENT, fragments
from kernel_shim.packet.icmp import IcmpError, RateLimit, error_packet
from kernel_shim.packet.ip import IPV6_SMALLEST_MTU, Layout, Malformed, address_bytes, destination, layout, refresh_header_checksum, source
from kernel_shim.policy.headers import PORT_PROTOCOLS
from kernel_shim.reasons import DropReason

# RFC 4950 section 3
_STACK_CLASS: Final = 1
_INCOMING_STACK: Final = 1
_EXTENSION_VERSION: Final = 2 << 4  # RFC 4884 section 7

# Limits of this implementation
MAX_LOOKUPS: Final = 8  # of one packet, from VRF to VRF


@dataclass(frozen=True, slots=True)
class AsIp:
    """To a peer, with no label left."""

    peer: str


class Sent(NamedTuple):
    """A packet on its way: stack and payload to a peer, IP to a peer or an interface."""

    next_hop: ToPeer | AsIp | ToInterface
    packet: bytes


class Outcome(NamedTuple):
    """What became of one packet. `reason` says why it went no further; `sent` then holds the error to its sender, if any.

    `alert`: it bore a router alert label.
    """

    sent: tuple[Sent, ...] = ()
    reason: DropReason | None = None
    alert: bool = False


def flow_hash(payload: memoryview, stack: tuple[Entry, ...] = ()) -> int:
    """A number that all packets of a flow share: of addresses, protocol and ports, else of the labels. Fragments leave out the ports."""
    try:
        parsed = layout(payload)
    except Malformed:
        return crc32(write_stack([Entry(entry.label, 0, 0) for entry in stack]))
    key = bytes(address_bytes(payload)) + bytes((parsed.protocol,))
    if parsed.protocol in PORT_PROTOCOLS and not parsed.fragment and parsed.upper + 4 <= parsed.length:
        key += payload[parsed.upper : parsed.upper + 4]
    return crc32(key)


def write_ttl(packet: bytearray | memoryview, ttl: int) -> None:
    """Lower the TTL of an IP packet to `ttl`; it is never raised."""
    at = 8 if packet[0] >> 4 == 4 else 7
    if ttl < packet[at]:
        packet[at] = ttl
        if at == 8:
            refresh_header_checksum(packet)


def read_dscp(packet: bytes | bytearray | memoryview) -> int:
    return packet[1] >> 2 if packet[0] >> 4 == 4 else (packet[0] << 8 | packet[1]) >> 6 & 0x3F


def write_dscp(packet: bytearray | memoryview, dscp: int) -> None:
    """The ECN bits stay."""
    if packet[0] >> 4 == 4:
        packet[1] = dscp << 2 | packet[1] & 3
        refresh_header_checksum(packet)
    else:
        word = (packet[0] << 8 | packet[1]) & 0xF03F | dscp << 6
        packet[0], packet[1] = word >> 8, word & 0xFF


def bring_to_light(classes: ClassMap, packet: bytearray | memoryview, ttl: int | None, traffic_class: int | None) -> None:
    """Give an IP packet the TTL and class that the labels above it had; None leaves its own."""
    if ttl is not None:
        write_ttl(packet, ttl)
    # A DSCP that already stands for the class keeps its lower bits.
    if traffic_class is not None and classes.traffic_class(read_dscp(packet)) != traffic_class:
        write_dscp(packet, classes.dscp(traffic_class))


def stack_extension(stack: tuple[Entry, ...]) -> bytes:
    """The extension structure that shows an incoming stack (RFC 4950 section 3)."""
    labels = write_stack(stack)
    structure = bytearray(struct.pack("!BBHHBB", _EXTENSION_VERSION, 0, 0, 4 + len(labels), _STACK_CLASS, _INCOMING_STACK)) + labels
    structure[2:4] = checksum(partial_sum(structure)).to_bytes(2, "little")
    return bytes(structure)


def onward(forwarder: Forwarder, vrf: str, packet: memoryview) -> tuple[ToPeer | ToInterface, Nhlfe] | DropReason:
    """The path of an IP packet out of `vrf`, through as many VRFs as it leads."""
    for _ in range(MAX_LOOKUPS):
        found = forwarder.depart(vrf, destination(packet), lambda: flow_hash(packet))
        if isinstance(found, DropReason):
            return found
        if not isinstance(found.next_hop, ToVrf):
            return found.next_hop, found.path
        vrf = found.next_hop.vrf
    return DropReason.MPLS_NO_ROUTE


class LabelSwitch:
    """`limit(peer)` is the longest stack with payload that the tunnel to `peer` takes, in octets.

    `address(vrf, version)` is this node's own in that VRF, packed, from which its errors come; b"" when it has none.
    """

    def __init__(
        self,
        forwarder: Forwarder,
        limit: Callable[[str], int],
        errors: RateLimit | None = None,
        address: Callable[[str, int], bytes] = lambda _vrf, _version: b"",
    ) -> None:
        self._forwarder: Final = forwarder
        self._limit: Final = limit
        self._address: Final = address
        self._errors: Final = errors if errors is not None else RateLimit()

    # 1. From a VRF

    def from_vrf(self, vrf: str, packet: bytes | bytearray | memoryview, now: float) -> Outcome:
        """IP whose TTL is what it leaves with. Never raises."""
        return self._depart(vrf, memoryview(bytearray(packet)), now, ())

    def _depart(self, vrf: str, payload: memoryview, now: float, stack: tuple[Entry, ...], *, errors: bool = True) -> Outcome:
        try:
            parsed = layout(payload)
        except Malformed:
            return Outcome(reason=DropReason.MPLS_PAYLOAD)
        payload = payload[: parsed.length]
        found = onward(self._forwarder, vrf, payload)
        if isinstance(found, DropReason):
            return self._dead_end(found, IcmpError.HOST_UNREACHABLE, vrf, payload, parsed, stack, now) if errors else Outcome(reason=found)
        hop, path = found
        if isinstance(hop, ToInterface):
            return Outcome((Sent(hop, bytes(payload)),))
        labels = self._forwarder.imposed(path, payload[8 if parsed.version == 4 else 7], read_dscp(payload), lambda: flow_hash(payload))
        return self._fit(hop, labels, payload, parsed, now, lambda error, mtu: self._to_vrf(vrf, error, mtu, payload, parsed, stack, now))

    # 2. From a peer

    def from_peer(self, name: str, packet: bytes | bytearray | memoryview, now: float) -> Outcome:
        """Stack and payload as a peer sent them. Never raises."""
        peer = self._forwarder.lfib.peer(name)
        if peer is None:
            return Outcome(reason=DropReason.MPLS_PEER_UNKNOWN)
        try:
            stack = read_stack(packet)
        except MalformedStack as error:
            return Outcome(reason=DropReason.MPLS_TOO_DEEP if error.too_deep else DropReason.MPLS_NO_BOTTOM)
        payload = memoryview(bytearray(packet))[4 * len(stack) :]
        try:
            parsed: Layout | None = layout(payload)
        except Malformed:
            parsed = None
        way = self._forwarder.arrive(peer, stack, parsed.version if parsed else 0, lambda: flow_hash(payload, stack))
        if isinstance(way, DropReason):
            if way is not DropReason.MPLS_TTL_EXPIRED or parsed is None:
                return Outcome(reason=way)
            return Outcome(self._answer(peer, IcmpError.TIME_EXCEEDED, 0, payload, parsed, stack, now), way)
        kept = stack[way.taken // 4 :]
        if isinstance(way.next_hop, ToPeer) and (way.stack or kept):
            return self._fit(
                way.next_hop,
                way.stack + write_stack(kept),
                payload,
                parsed,
                now,
                lambda error, mtu: self._answer(peer, error, mtu, payload, parsed, stack, now) if parsed else (),
            )._replace(alert=way.alert)
        assert parsed is not None
        bring_to_light(self._forwarder.classes, payload, way.ttl, way.traffic_class)
        payload = payload[: parsed.length]
        if isinstance(way.next_hop, ToVrf):
            return self._depart_again(way.next_hop.vrf, payload, stack, now)._replace(alert=way.alert)
        if isinstance(way.next_hop, ToPeer):
            return self._fit(way.next_hop, b"", payload, parsed, now, lambda error, mtu: self._answer(peer, error, mtu, payload, parsed, stack, now))
        return Outcome((Sent(way.next_hop, bytes(payload)),), alert=way.alert)

    def _depart_again(self, vrf: str, payload: memoryview, stack: tuple[Entry, ...], now: float) -> Outcome:
        """By IP in a VRF, from the core: to its interface, or on to another peer, which costs a hop here."""
        found = onward(self._forwarder, vrf, payload)
        if not isinstance(found, DropReason) and isinstance(found[0], ToPeer):
            ttl = payload[8 if payload[0] >> 4 == 4 else 7]
            if ttl <= 1:
                return self._dead_end(DropReason.MPLS_TTL_EXPIRED, IcmpError.TIME_EXCEEDED, vrf, payload, layout(payload), stack, now)
            write_ttl(payload, ttl - 1)
        return self._depart(vrf, payload, now, stack)

    # 3. Fit

    def _fit(
        self, to: ToPeer, labels: bytes, payload: memoryview, parsed: Layout | None, now: float, tell: Callable[[IcmpError, int], tuple[Sent, ...]]
    ) -> Outcome:
        limit = self._limit(to.peer)
        hop = to if labels else AsIp(to.peer)
        if len(labels) + len(payload) <= limit:
            return Outcome((Sent(hop, labels + bytes(payload)),))
        room = limit - len(labels)
        if parsed is None:
            return Outcome(reason=DropReason.MPLS_TOO_BIG)
        if parsed.dont_fragment or room < SMALLEST_FRAGMENT:
            mtu = room if parsed.version == 4 else max(room, IPV6_SMALLEST_MTU)
            return Outcome(tell(IcmpError.TOO_BIG, mtu), DropReason.MPLS_TOO_BIG)
        return Outcome(tuple(Sent(hop, labels + bytes(piece)) for piece in fragments(payload, parsed, room)))

    # 4. Answer

    def _error(
        self, error: IcmpError, mtu: int, payload: memoryview, parsed: Layout, stack: tuple[Entry, ...], now: float, vrf: str | None = None
    ) -> bytes | None:
        """With `vrf` from the node's address there, if it leaves by a peer: the host here believes no other in that address."""
        message = error_packet(error, payload, parsed, mtu, stack_extension(stack) if stack else b"")
        if message is None or not self._errors.allow(now):
            return None
        if vrf is None or not (origin := self._address(vrf, parsed.version)):
            return message
        found = onward(self._forwarder, vrf, memoryview(message))
        if isinstance(found, DropReason) or isinstance(found[0], ToInterface):
            return message
        return error_packet(error, payload, parsed, mtu, stack_extension(stack) if stack else b"", origin)

    def _dead_end(self, reason: DropReason, error: IcmpError, vrf: str, payload: memoryview, parsed: Layout, stack: tuple[Entry, ...], now: float) -> Outcome:
        return Outcome(self._to_vrf(vrf, error, 0, payload, parsed, stack, now), reason)

    def _to_vrf(self, vrf: str, error: IcmpError, mtu: int, payload: memoryview, parsed: Layout, stack: tuple[Entry, ...], now: float) -> tuple[Sent, ...]:
        """To the sender, by the VRF's own routes; to its interface when it has none to there."""
        message = self._error(error, mtu, payload, parsed, stack, now, vrf)
        if message is None:
            return ()
        if isinstance(self._forwarder.depart(vrf, source(payload), lambda: 0), DropReason):
            return (Sent(ToInterface(vrf), message),)
        return self._depart(vrf, memoryview(bytearray(message)), now, (), errors=False).sent

    def _answer(self, peer: Peer, error: IcmpError, mtu: int, payload: memoryview, parsed: Layout, stack: tuple[Entry, ...], now: float) -> tuple[Sent, ...]:
        """Along the LSP: its end knows the customer whose packet it was."""
        fresh = tuple(Entry(entry.label, entry.tc, LARGEST_TTL) for entry in stack)
        way = self._forwarder.arrive(peer, fresh, parsed.version, lambda: flow_hash(payload, stack))
        if isinstance(way, DropReason):
            return ()
        message = self._error(error, mtu, payload, parsed, stack, now, None if isinstance(way.next_hop, ToPeer) else way.next_hop.vrf)
        if message is None:
            return ()
        if isinstance(way.next_hop, ToPeer):
            labels = way.stack + write_stack(fresh[way.taken // 4 :])
            return (Sent(way.next_hop if labels else AsIp(way.next_hop.peer), labels + message),)
        vrf = way.next_hop.vrf
        return self._depart(vrf, memoryview(bytearray(message)), now, (), errors=False).sent
