"""Where frames come from other than the host's TUN: the interface of a VRF, or a peer whose labels lead on to another peer.

An origin cuts flow keys of its own, and says what travels in which tunnel; whether that tunnel is protected, and by which SA,
is for the SPD to say, as for any other packet.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from kernel_shim.dataplane.output import Sink
from kernel_shim.model import Flow, Mode
from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation
from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import ENTRY, MAX_DEPTH
from kernel_shim.mpls.lfib import Nhlfe, ToInterface
from kernel_shim.mpls.node import LabelNode, Tunnel
from kernel_shim.mpls.switch import flow_hash, onward, read_dscp
from kernel_shim.packet.ip import IPV6_HEADER, PROTOCOL_IPIP, PROTOCOL_IPV6, UDP_HEADER, Buffer, build_header
from kernel_shim.policy.flowkey import FULL_KEY_V6, FieldMask, FlowKeys
from kernel_shim.reasons import DropReason

TAG: Final = FULL_KEY_V6 + 1  # octets: so no key of an origin is as short as one of the host's
_OUTER_TTL: Final = 64
LARGEST_COVER: Final = IPV6_HEADER + UDP_HEADER + ENTRY * MAX_DEPTH  # octets
MAX_STACKS: Final = 64  # of one bundle, by TTL and class


class LabelCover:
    """Implements `kernel_shim.dataplane.bundle.Cover`: a label stack in IP, GRE or UDP; under an SA of tunnel mode with an IP header before."""

    def __init__(self, forwarder: Forwarder, tunnel: Tunnel, path: Nhlfe | None, number: int, mode: Mode) -> None:
        """`number` is the flow's hash. Without `path` the packet brings its stack along."""
        self._forwarder, self._tunnel, self._path, self._number = forwarder, tunnel, path, number
        self._outer = mode is Mode.TUNNEL
        self._stacks: dict[tuple[int, int], bytes] = {}
        # Without a length in it what stands before a packet follows from the start of its header alone.
        self._ready: dict[bytes, bytes] | None = {} if path is not None and not self._outer and tunnel.encapsulation is not Encapsulation.UDP else None
        version = tunnel.local.version
        self.next_header: Final[int] = (PROTOCOL_IPIP if version == 4 else PROTOCOL_IPV6) if self._outer else int(tunnel.encapsulation)
        self.length: Final = tunnel.encapsulation.overhead + len(self._stack(0, 0)) + (len(self._header(0)) if self._outer else 0)

    @property
    def labels(self) -> tuple[int, ...]:
        """Those that go on, outermost first."""
        return self._path.labels if self._path is not None else ()

    @property
    def peer(self) -> str:
        return self._tunnel.peer

    def before(self, packet: Buffer, length: int) -> bytes:
        if self._ready is None:
            return self._cover(packet, length)
        head = bytes(packet[:2]) + bytes(packet[7:9])  # version, class and TTL of either IP
        cover = self._ready.get(head)
        if cover is None:
            if len(self._ready) >= MAX_STACKS:
                self._ready.clear()
            cover = self._ready[head] = self._cover(packet, length)
        return cover

    def _cover(self, packet: Buffer, length: int) -> bytes:
        first = packet[0] >> 4
        stack = b""
        if self._path is not None:
            stack = self._stack(packet[8 if first == 4 else 7], read_dscp(packet))
        labelled = self._tunnel.encapsulation.header(len(stack) + length, self._number) + stack
        return self._header(len(labelled) + length) + labelled if self._outer else labelled

    def _header(self, payload: int) -> bytes:
        tunnel = self._tunnel
        return build_header(tunnel.local.version, tunnel.local.packed, tunnel.remote.packed, tunnel.encapsulation, payload, _OUTER_TTL)

    def _stack(self, ttl: int, dscp: int) -> bytes:
        if self._path is None:
            return b""
        stack = self._stacks.get((ttl, dscp))
        if stack is None:
            if len(self._stacks) >= MAX_STACKS:
                self._stacks.clear()
            stack = self._stacks[ttl, dscp] = self._forwarder.imposed(self._path, ttl, dscp, lambda: self._number)
        return stack


class Carried(NamedTuple):
    """A packet that goes through a tunnel. `number` is its flow's hash; `path` None: its labels are on it already."""

    tunnel: Tunnel
    path: Nhlfe | None
    number: int

    @property
    def flow(self) -> Flow:
        """The tunnel's packets, as the SPD sees them."""
        tunnel = self.tunnel
        if tunnel.encapsulation is Encapsulation.UDP:
            header = tunnel.encapsulation.header(0, self.number)
            return Flow(tunnel.local, tunnel.remote, tunnel.encapsulation, header[0] << 8 | header[1], UDP_PORT)
        return Flow(tunnel.local, tunnel.remote, tunnel.encapsulation)


class Origin(Protocol):
    reason: DropReason  # of the last None or drop

    def cut(self, buffer: Buffer, offset: int) -> bytes | None:
        """The flow key of the packet at `offset`; None when it has none."""

    def carry(self, packet: memoryview) -> Carried | ToInterface | None:
        """The way of a packet; None when there is none."""

    def tell(self, frame: memoryview) -> None:
        """Hand an ICMP error to whoever sent the packet."""


class VrfOrigin:
    """Frames of one VRF's interface."""

    def __init__(self, vrf: str, number: int, node: LabelNode, sink: Sink) -> None:
        self.vrf: Final = vrf
        self._tag: Final = b"\xff" * (TAG - 4) + number.to_bytes(4, "big")
        self._node, self._sink = node, sink
        self.keys: Final = FlowKeys(self.wanted_mask)
        self.reason = DropReason.MPLS_NO_ROUTE

    @property
    def wanted_mask(self) -> FieldMask:
        return FieldMask.FLOW if self._node.spreads else FieldMask.DESTINATION

    def is_of(self, key: bytes) -> bool:
        """Whether this origin cut that key; from TAG on it is the flow's."""
        return key.startswith(self._tag)

    def cut(self, buffer: Buffer, offset: int) -> bytes | None:
        key = self.keys.cut(buffer, offset)
        if key is None:
            self.reason = self.keys.reason
            return None
        return self._tag + key

    def carry(self, packet: memoryview) -> Carried | ToInterface | None:
        self.reason = DropReason.MPLS_NO_ROUTE
        found = onward(self._node.forwarder, self.vrf, packet)
        if isinstance(found, DropReason):
            return None
        hop, path = found
        if isinstance(hop, ToInterface):
            return hop if hop.vrf != self.vrf else None  # back where it came from is the host's to route
        tunnel = self._node.tunnel(hop.peer)
        return Carried(tunnel, path, flow_hash(packet)) if tunnel is not None else None

    def tell(self, frame: memoryview) -> None:
        self._sink.write_vrf(self.vrf, frame)


class TransitOrigin:
    """Packets whose stack is written already, to one peer. A frame is a virtio header of zeros, stack and payload."""

    def __init__(self, peer: str, number: int, node: LabelNode) -> None:
        self._peer, self._node = peer, node
        self._key: Final = b"\xfe" * (TAG - 4) + number.to_bytes(4, "big")
        self.reason = DropReason.MPLS_NO_ROUTE

    def cut(self, buffer: Buffer, offset: int) -> bytes | None:
        return self._key

    def carry(self, packet: memoryview) -> Carried | ToInterface | None:
        tunnel = self._node.tunnel(self._peer)
        return Carried(tunnel, None, 0) if tunnel is not None else None

    def tell(self, frame: memoryview) -> None:
        """`LabelSwitch` tells what it finds; what happens to a packet later on, its sender does not hear."""
