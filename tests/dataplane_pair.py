"""Two engines back to back in memory, on a clock that the test moves; the test plays key manager."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.dataplane.engine import Engine, EngineConfig
from kernel_shim.esp.cipher import EspCipher, make_cipher
from kernel_shim.model import (
    PORT_NAT_T,
    Acquire,
    AcquireSequence,
    Action,
    AddressRange,
    Direction,
    Endpoint,
    KernelEvent,
    Mode,
    Policy,
    ReqId,
    SecurityAssociation,
    Selector,
    Spi,
    Template,
    TrafficSelector,
    UdpEncapsulation,
)
from kernel_shim.packet import virtio
from kernel_shim.packet.segment import complete_checksum, read_super, segments
from kernel_shim.packet.virtio import VnetHeader
from kernel_shim.secret import Secret

GCM = EspAlgorithm(EncryptionId.AES_GCM_16, 128)
OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
INNER = {4: ("10.1.0.0/16", "10.2.0.0/16"), 6: ("fd01::/64", "fd02::/64")}


def entropy(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def addresses(network: str) -> AddressRange:
    return AddressRange.of(ip_network(network))


@dataclass
class Sent:
    local: Endpoint
    remote: Endpoint
    data: bytes
    segment: int
    whole: bool = True  # False: may travel in fragments
    traffic_class: int = 0

    def datagrams(self) -> list[bytes]:
        return [self.data[i : i + self.segment] for i in range(0, len(self.data), self.segment)]


@dataclass
class MemorySink:
    """Keeps everything; the largest segment counts and sizes are what the kernel takes."""

    esp: list[Sent] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    clear: list[bytes] = field(default_factory=list)
    vrfs: dict[str, list[bytes]] = field(default_factory=dict)

    def send_esp(self, local: Endpoint, remote: Endpoint, buffer: memoryview, segment_size: int, *, whole: bool = True, traffic_class: int = 0) -> None:
        assert 0 < len(buffer) <= 65507
        assert -(-len(buffer) // segment_size) <= 64
        self.esp.append(Sent(local, remote, bytes(buffer), segment_size, whole, traffic_class))

    def write_tun(self, frame: memoryview) -> None:
        assert_taken(frame)
        self.frames.append(bytes(frame))

    def write_vrf(self, vrf: str, frame: memoryview) -> None:
        assert_taken(frame)
        self.vrfs.setdefault(vrf, []).append(bytes(frame))

    def bypass(self, frame: memoryview) -> None:
        self.clear.append(bytes(frame))


def assert_taken(frame: memoryview) -> None:
    """A TUN refuses what UDP could not send in one (linux/virtio_net.h, virtio_net_hdr_to_skb)."""
    vnet = VnetHeader.unpack(frame)
    assert vnet.gso_type != virtio.GSO_UDP_L4 or len(frame) - virtio.LENGTH - vnet.header_length <= 64 * vnet.gso_size


def packets_of(frame: bytes) -> list[bytes]:
    """What a host makes of a frame: its packets, checksums complete."""
    vnet, packet = VnetHeader.unpack(frame), memoryview(bytearray(frame[virtio.LENGTH :]))
    if vnet.gso_type:
        return [bytes(piece) for piece in segments(read_super(vnet, packet))]
    if vnet.flags & virtio.NEEDS_CHECKSUM:
        assert complete_checksum(vnet, packet)
    return [bytes(packet)]


class Gateway:
    def __init__(self, seed: int, config: EngineConfig | None = None) -> None:
        self.sink = MemorySink()
        self.engine = Engine(config or EngineConfig(udp_segmentation=True), entropy(seed), self.sink)
        self.events: list[KernelEvent] = []
        self.engine.subscribe(self.events.append)
        self.engine.key_manager_listens(True, 0.0)

    def sent(self) -> list[Sent]:
        out, self.sink.esp = self.sink.esp, []
        return out

    def received(self, now: float = 100.0) -> list[bytes]:
        self.engine.flush(now)
        frames, self.sink.frames = self.sink.frames, []
        return [packet for frame in frames for packet in packets_of(frame)]

    def landed(self, vrf: str, now: float = 100.0) -> list[bytes]:
        """Packets at the interface of a VRF."""
        self.engine.flush(now)
        return [packet for frame in self.sink.vrfs.pop(vrf, []) for packet in packets_of(frame)]

    def take(self, sent: list[Sent], now: float) -> None:
        for item in sent:
            self.engine.receive(item.remote, item.local, item.data, item.segment, now, item.traffic_class)
        self.engine.flush(now)

    def acquires(self) -> list[Acquire]:
        return [event for event in self.events if isinstance(event, Acquire)]

    def count(self, name: str) -> int:
        return self.engine.statistics()[name]


class Pair:
    """`left` protects INNER[inner][0], `right` INNER[inner][1]; every SA has ESP between the two OUTER addresses."""

    def __init__(self, inner: int = 4, outer: int = 4, mode: Mode = Mode.TUNNEL, config: EngineConfig | None = None, policies: bool = True) -> None:
        self.left, self.right = Gateway(1, config), Gateway(2, config)
        self.inner, self.outer, self.mode = inner, outer, mode
        self.now = 100.0
        self.spi = 0x1000
        if mode is Mode.TRANSPORT:
            self.nets = OUTER[outer]
        else:
            self.nets = INNER[inner]
        if policies:
            for gateway, (mine, theirs), (here, there) in (
                (self.left, self.nets, OUTER[outer]),
                (self.right, self.nets[::-1], OUTER[outer][::-1]),
            ):
                for policy in policy_pair(mine, theirs, here, there, mode):
                    gateway.engine.add_policy(policy, self.now)

    def sa(self, from_left: bool, direction: Direction, **changes: object) -> SecurityAssociation:
        outer = [ip_address(a) for a in OUTER[self.outer]]
        source, destination = outer if from_left else outer[::-1]
        algorithm = changes.pop("algorithm", GCM)
        assert isinstance(algorithm, EspAlgorithm)
        spi = Spi(int(changes.pop("spi", self.spi + (0 if from_left else 64))))  # type: ignore[call-overload]
        rand = random.Random(spi)
        return SecurityAssociation(
            **{  # type: ignore[arg-type]
                "spi": spi,
                "source": source,
                "destination": destination,
                "direction": direction,
                "mode": self.mode,
                "reqid": ReqId(7),
                "algorithm": algorithm,
                "encryption_key": Secret(rand.randbytes(algorithm.encryption_key_length)),
                "integrity_key": Secret(rand.randbytes(algorithm.integrity_key_length)),
                "encapsulation": UdpEncapsulation(),
                **changes,
            }
        )

    def cipher(self, from_left: bool) -> EspCipher:
        """The cipher of the SA that `connect` made."""
        sa = self.sa(from_left, Direction.OUT)
        return make_cipher(sa.algorithm, sa.encryption_key, sa.integrity_key, sa.spi, sa.esn, entropy(1))

    def connect(self, **changes: object) -> None:
        """Both directions, inbound before outbound."""
        self.right.engine.add_sa(self.sa(True, Direction.IN, **changes), self.now)
        self.left.engine.add_sa(self.sa(False, Direction.IN, **changes), self.now)
        acquire = self.left.acquires()[-1].sequence if self.left.acquires() else AcquireSequence(0)
        self.left.engine.add_sa(self.sa(True, Direction.OUT, **{"acquire": acquire, **changes}), self.now)
        self.right.engine.add_sa(self.sa(False, Direction.OUT, **changes), self.now)

    def next_spis(self) -> None:
        self.spi += 0x1000

    def packet(self, number: int = 0, size: int = 64, proto: str = "udp", sport: int = 1000, left: bool = True, host: int = 9) -> bytes:
        """A packet from the left network to the right one, or back, that carries `number`."""
        source, destination = (self.hosts(host)) if left else self.hosts(host)[::-1]
        upper = UDP(sport=sport, dport=2000) if proto == "udp" else TCP(sport=sport, dport=2000, seq=number, flags="A")
        body = number.to_bytes(4, "big") + random.Random(number).randbytes(max(0, size - 4))
        ip = IP(src=source, dst=destination, flags="DF") if self.version == 4 else IPv6(src=source, dst=destination)
        return bytes(ip / upper / Raw(body))

    @property
    def version(self) -> int:
        return self.outer if self.mode is Mode.TRANSPORT else self.inner

    def hosts(self, host: int) -> tuple[str, str]:
        if self.mode is Mode.TRANSPORT:
            return OUTER[self.outer]
        nets = [ip_network(n) for n in self.nets]
        return str(nets[0][host]), str(nets[1][host])

    def super_frame(self, payload: bytes, size: int, proto: str = "tcp", left: bool = True, df: bool = True) -> bytes:
        """What a TUN gives for one offloaded write of `payload`."""
        source, destination = self.hosts(9) if left else self.hosts(9)[::-1]
        ip = IP(src=source, dst=destination, flags="DF" if df else 0, id=77) if self.version == 4 else IPv6(src=source, dst=destination)
        upper = TCP(sport=5, dport=6, seq=1000, flags="PA", options=[("Timestamp", (1, 2))]) if proto == "tcp" else UDP(sport=5, dport=6)
        packet = bytes(ip / upper / Raw(payload))
        kind = virtio.GSO_UDP_L4 if proto == "udp" else virtio.GSO_TCPV4 if self.version == 4 else virtio.GSO_TCPV6
        start = 20 if self.version == 4 else 40
        return VnetHeader(virtio.NEEDS_CHECKSUM, kind, 0, size, start, 16 if proto == "tcp" else 6).pack() + packet

    def send(self, *packets: bytes, left: bool = True) -> None:
        engine = (self.left if left else self.right).engine
        for packet in packets:
            engine.send(virtio.NO_OFFLOAD + packet, self.now)
        engine.flush(self.now)

    def pass_on(self) -> None:
        """Everything sent arrives."""
        left, right = self.left.sent(), self.right.sent()
        self.right.take(left, self.now)
        self.left.take(right, self.now)

    def settle(self) -> None:
        for gateway in (self.left, self.right):
            for _ in range(1000):
                deadline = gateway.engine.next_deadline()
                if deadline is None or deadline > self.now:
                    break
                gateway.engine.tick(self.now)
        self.pass_on()


def policy_pair(mine: str, theirs: str, here: str, there: str, mode: Mode = Mode.TUNNEL, reqid: int = 7, **changes: object) -> list[Policy]:
    """OUT and IN."""
    a, b = (addresses(mine), addresses(theirs)) if "/" in mine else (AddressRange.host(ip_address(mine)), AddressRange.host(ip_address(theirs)))
    out = Template(mode, ReqId(reqid), ip_address(here), ip_address(there))
    back = Template(mode, ReqId(reqid), ip_address(there), ip_address(here))
    return [
        Policy(Selector(a, b), Direction.OUT, Action.PROTECT, 100, (out,), **changes),  # type: ignore[arg-type]
        Policy(Selector(b, a), Direction.IN, Action.PROTECT, 100, (back,)),
    ]


def selector(network: str) -> TrafficSelector:
    return TrafficSelector(addresses(network))


def endpoints(outer: int = 4) -> tuple[Endpoint, Endpoint]:
    left, right = OUTER[outer]
    return Endpoint(ip_address(left), PORT_NAT_T), Endpoint(ip_address(right), PORT_NAT_T)
