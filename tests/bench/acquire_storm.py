"""Rows `acquire-storm`: more flows than a key manager's buffers hold ask for SAs while it does not read. On a virtual clock."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from dataplane_pair import entropy
from pfkey_support import PipeSockets, Talk
from scapy.layers.inet import IP, UDP
from shim_rig import GCM

from bench.rows import Row
from kernel_shim.dataplane.engine import Engine, EngineConfig
from kernel_shim.model import (
    Acquire,
    Action,
    AddressRange,
    Direction,
    Endpoint,
    IPAddress,
    Mode,
    Policy,
    ReqId,
    SecurityAssociation,
    Selector,
    Spi,
    Template,
    UdpEncapsulation,
)
from kernel_shim.packet.virtio import VnetHeader
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import MessageType, SaType
from kernel_shim.pfkey.event_messages import event_from
from kernel_shim.pfkey.messages import Message
from kernel_shim.pfkey.private import Hello
from kernel_shim.pfkey.server import ServerSession
from kernel_shim.secret import Secret

FLOWS: Final = 100_000
POLICIES: Final = 10  # each of transport mode towards a /16: every peer is asked for by itself
STALL: Final = 20.0  # s
LONGEST: Final = 600.0  # s until what was not told counts as lost
WAITING_CEILING: Final = 256.0  # MB more than before: ACQUIREs, queues and packets
MEMORY_CEILING: Final = 512.0  # with the SAs that came of it, at their most
READS_A_STEP: Final = 64
HERE: Final = IPv4Address("10.200.0.1")
_CODEC: Final = Codec()


class _Nowhere:
    """A sink that only counts."""

    def __init__(self) -> None:
        self.sent = 0

    def send_esp(self, local: Endpoint, remote: Endpoint, buffer: memoryview, segment_size: int, *, whole: bool = True, traffic_class: int = 0) -> None:
        self.sent += -(-len(buffer) // segment_size)

    def write_tun(self, frame: memoryview) -> None:
        """ICMP to a sender whose packet was dropped."""

    def write_vrf(self, vrf: str, frame: memoryview) -> None:
        raise AssertionError("a packet to a VRF")

    def bypass(self, frame: memoryview) -> None:
        raise AssertionError("a packet in clear")


@dataclass
class Outcome:
    """`never_told` flows asked for an SA, and the key manager was never told; times are of the virtual clock."""

    never_told: int = 0
    unresolved: int = 0
    overruns: int = 0
    seconds: float = 0.0
    told: set[IPAddress] = field(default_factory=set)
    waiting: float = 0.0  # MB that the storm takes
    memory: float = 0.0  # MB, with all SAs


def storm(*, flows: int, stall: float) -> Outcome:
    outcome, now = Outcome(), 0.0
    before = _memory()
    engine = Engine(EngineConfig(), entropy(1), _Nowhere())
    session = ServerSession(engine, PipeSockets())
    talk = Talk.start(session)
    talk.ask(_CODEC.encode(Message(MessageType.REGISTER, SaType.ESP, 0, 1, 7, (Hello(),))))
    for number in range(POLICIES):
        network = AddressRange.of(IPv4Network((int(IPv4Address("10.0.0.0")) + (number << 16), 16)))
        engine.add_policy(
            Policy(Selector(AddressRange.host(HERE), network), Direction.OUT, Action.PROTECT, 1000, (Template(Mode.TRANSPORT, ReqId(number + 1)),)), now
        )
    asked = {_peer(number, flows) for number in range(flows)}
    packet = bytearray(bytes(VnetHeader().pack() + bytes(IP(src=str(HERE), dst="10.0.0.0") / UDP(sport=1000, dport=2000))))
    at = len(VnetHeader().pack()) + 16  # of the destination; nothing here looks at checksums
    for number in range(flows):
        packet[at : at + 4] = _peer(number, flows).packed
        engine.send(bytes(packet), now)
        if number % 64 == 0:
            engine.flush(now)
    engine.flush(now)
    outcome.waiting = _memory() - before
    while len(outcome.told) < flows and now < LONGEST:
        deadlines = [deadline for deadline in (engine.next_deadline(), session.next_deadline()) if deadline is not None]
        now = talk.now = max(now, min(deadlines, default=now + 1.0))
        engine.tick(now)
        engine.flush(now)
        if now < stall:
            continue
        session.tick(now)
        _negotiate(engine, talk, outcome, now)
    outcome.never_told = len(asked - outcome.told)
    statistics = {**engine.statistics(), **session.statistics()}
    outcome.unresolved = statistics["acquire_outstanding"]
    outcome.overruns, outcome.seconds, outcome.memory = statistics["pfkey.overruns"], now, _memory() - before
    return outcome


def _peer(number: int, flows: int) -> IPv4Address:
    share = -(-flows // POLICIES)
    return IPv4Address(int(IPv4Address("10.0.0.0")) + (number // share << 16) + number % share + 1)


def _negotiate(engine: Engine, talk: Talk, outcome: Outcome, now: float) -> None:
    """The key manager reads what there is, and each ACQUIRE gets its SA at once."""
    for _ in range(READS_A_STEP):
        data = talk.hear()
        if data is None:
            return
        event = event_from(_CODEC.decode(data))
        if not isinstance(event, Acquire) or event.destination is None or event.destination in outcome.told:
            continue
        outcome.told.add(event.destination)
        spi = Spi(0x1000 + len(outcome.told))
        key = Secret(spi.to_bytes(4, "big") * 5)
        sa = SecurityAssociation(
            *(spi, HERE, event.destination, Direction.OUT, Mode.TRANSPORT, event.reqid, GCM, key), encapsulation=UdpEncapsulation(), acquire=event.sequence
        )
        engine.add_sa(sa, now)


def _memory() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20)


def run() -> list[Row]:
    got = storm(flows=FLOWS, stall=STALL)
    note = f"{got.overruns:,} did not fit and were repeated; the last was told {got.seconds:.0f} s after the storm, {STALL:.0f} s of them stalled"
    return [
        Row("acquire-storm.never-told", "flows", "low", float(got.never_told), floor=0.0, aim=0.0, note=note),
        Row("acquire-storm.waiting", "MB more", "low", round(got.waiting), floor=WAITING_CEILING, aim=192.0, note=f"{FLOWS:,} flows wait"),
        Row("acquire-storm.memory", "MB more", "low", round(got.memory), floor=MEMORY_CEILING, aim=256.0, note="when each has its SA"),
    ]
