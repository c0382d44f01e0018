"""One simulated gateway: vpnd's daemon, a PF_KEY channel, our kernel, and the hosts behind it."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pfkey_support import SocketEdge

from kernel_shim.channel.api import KernelChannel
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.dataplane.engine import Engine, EngineConfig
from kernel_shim.model import Direction, Endpoint, IPAddress, SaState
from kernel_shim.packet import virtio
from simulation.wire import Wire
from vpnd.auth.credentials import CredentialStore
from vpnd.config import load_text
from vpnd.config.model import DaemonConfig
from vpnd.daemon.demands import Demands
from vpnd.daemon.kernel_side import KernelSide
from vpnd.daemon.manager import Manager
from vpnd.daemon.operations import Operations
from vpnd.gate import GateSettings
from vpnd.ike.context import IkeSettings
from vpnd.ike.exchanges.crash_detection import TokenMaker
from vpnd.telemetry.counters import Counters

_HEADER: Final = struct.Struct("!BBHHHBBH4s4sHHHHIQ")  # IPv4, UDP without a checksum, tunnel, number
_PROBE: Final = struct.Struct("!IQ")
_UDP: Final = 17
PROBE_LENGTH: Final = _HEADER.size
MANY: Final = GateSettings(cookie_threshold=1 << 20, cookie_threshold_ip=1 << 20, block_threshold=0, limit=1 << 20)


class Gateway:
    """`addresses` are its own on the wire. A datagram that leaves and one that arrives cost no time of their own."""

    def __init__(
        self, wire: Wire, addresses: Sequence[IPAddress], config: str, directory: Path, name: str, seed: int, settings: IkeSettings | None = None
    ) -> None:
        self.wire, self.name = wire, name
        self._addresses: Final = tuple(addresses)
        for address in addresses:
            wire.stations[address] = self
        self._loop = asyncio.get_running_loop()
        # the key manager holds the ages of SAs against the wall clock, and would else find the expiry of each overdue in every audit
        self.engine: Final = Engine(EngineConfig(epoch=time.time() - self._loop.time()), random.Random(seed).randbytes, self)
        self._socket: Final = directory / name
        self._edge: Final = SocketEdge(self._socket, self.engine)
        self._tick: asyncio.TimerHandle | None = None
        self._flushing = False
        self.engine.subscribe(lambda _event: self._soon())
        self.received: Final[Counter[int]] = Counter()  # probes by tunnel
        self._seen: set[tuple[int, int]] = set()
        self.repeated = 0
        self.clear = 0
        self._configuration: Final = load_text(config, Path("/nonexistent")).configuration
        self._seed, self._lives, self._dead = seed, 0, False
        self._settings: Final = settings or IkeSettings()
        self._begin()

    def _begin(self) -> None:
        """A key manager that knows nothing yet."""
        self._lives += 1
        self.counters = Counters()
        side = KernelSide(self._connect, self.counters)
        self.manager = Manager(
            side,
            self,
            CredentialStore.of(self._configuration),
            self._settings,
            MANY,
            self.counters,
            host=self,
            tokens=TokenMaker(self.name.encode() * 8),
            entropy=random.Random(f"{self.name}{self._seed}.{self._lives}").randbytes,
        )
        self.demands = Demands(self.manager, mark=1)
        self.operations = Operations(self.manager, self.demands, DaemonConfig())
        side.event, side.lost = self.demands.kernel_event, self.demands.ends.sas_lost

    async def _connect(self) -> KernelChannel:
        channel = PfKeyChannel(self._socket)
        await channel.open()
        return channel

    async def start(self) -> None:
        await self.manager.kernel.open()
        await self.operations.load(self._configuration)

    async def restart_key_manager(self) -> None:
        """It dies without a word; its kernel goes on, and its successor finds what it left."""
        self.demands.stop()
        dead, self._dead = self.manager, True
        await dead.kernel.close(leave=True)
        self._begin()
        self._dead = False
        await self.start()

    async def stop(self) -> None:
        """At once: nothing is said to peers."""
        self.demands.stop()
        self.manager.drain()
        await self.manager.kernel.close()
        if self._tick is not None:
            self._tick.cancel()
        self._edge.close()

    # vpnd.daemon.manager.Host

    def addresses(self) -> Sequence[IPAddress]:
        return self._addresses

    def source_towards(self, remote: IPAddress) -> IPAddress | None:
        return self._addresses[0]

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        return 1500

    # Its sockets

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        if not self._dead:
            self.wire.carry_ike(local, remote, data)

    def send_keepalive(self, local: Endpoint, remote: Endpoint) -> None:
        pass

    def ike(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        if not self._dead:
            self.manager.datagram(local, remote, data)

    def esp(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        self.engine.receive(local, remote, data, len(data), self._loop.time())
        self._soon()

    # kernel_shim.dataplane.output.Sink

    def send_esp(self, local: Endpoint, remote: Endpoint, buffer: memoryview, segment_size: int, **_marks: object) -> None:
        for begin in range(0, len(buffer), segment_size):
            self.wire.carry_esp(local, remote, bytes(buffer[begin : begin + segment_size]))

    def write_tun(self, frame: memoryview) -> None:
        packet = frame[virtio.LENGTH :]
        if len(packet) == PROBE_LENGTH and packet[9] == _UDP:
            tunnel, number = _PROBE.unpack_from(packet, PROBE_LENGTH - _PROBE.size)
            if (tunnel, number) in self._seen:
                self.repeated += 1
            self._seen.add((tunnel, number))
            self.received[tunnel] += 1

    def write_vrf(self, vrf: str, frame: memoryview) -> None:
        raise AssertionError("no VRF here")

    def bypass(self, frame: memoryview) -> None:
        self.clear += 1

    # Its hosts

    def probe(self, tunnel: int, number: int, source: bytes, destination: bytes) -> None:
        """A host sends packet `number` of this tunnel."""
        packet = _HEADER.pack(0x45, 0, PROBE_LENGTH, 0, 0x4000, 64, _UDP, 0, source, destination, 4000, 4000, 8 + _PROBE.size, 0, tunnel, number)
        self.engine.send(virtio.NO_OFFLOAD + packet, self._loop.time())
        self._soon()

    def forget_probes(self) -> None:
        """Those of the past are not repeated any more: what is remembered of them goes."""
        self._seen.clear()

    # Its kernel's turns

    def _soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._flushing = False
        engine, now = self.engine, self._loop.time()
        deadline = engine.next_deadline()
        if deadline is not None and deadline <= now:
            engine.tick(now)
        engine.flush(now)
        self._edge.send_ready()
        deadline = engine.next_deadline()
        if self._tick is not None:
            self._tick.cancel()
        self._tick = self._loop.call_at(deadline, self._turn) if deadline is not None else None

    # What stands

    def sas(self, direction: Direction) -> dict[tuple[IPAddress, int], bytes]:
        """Keys of usable SAs by destination and SPI."""
        return {
            (status.sa.destination, status.sa.spi): status.sa.encryption_key.reveal()
            for status in self.engine.sas()
            if status.sa.direction is direction and status.state is not SaState.LARVAL
        }


async def settled(a: Gateway, b: Gateway, tunnels: int, seconds: float) -> bool:
    """Whether both SADs come to hold the same SAs, in opposite directions, one pair for each tunnel, within that much virtual time.

    Of many tunnels one is always being rekeyed: there is a moment when what each side sends by is what the other one receives by. What else they receive
    by then goes, if its delete was heard of and it took packets under way, or is sent by, if it was new.
    """
    leftovers: list[tuple[Gateway, Gateway, set[tuple[IPAddress, int]]]] = []

    def paired() -> bool:
        leftovers.clear()
        for near, far in ((a, b), (b, a)):
            out, into = near.sas(Direction.OUT), far.sas(Direction.IN)
            if len(out) != tunnels or not out.items() <= into.items():
                return False
            leftovers.append((near, far, into.keys() - out.keys()))
        return True

    if not await until(paired, seconds):
        return False

    def resolved() -> bool:
        return not any((left & far.sas(Direction.IN).keys()) - near.sas(Direction.OUT).keys() for near, far, left in leftovers)

    return await until(resolved, seconds, step=1.0)


async def until(condition: Callable[[], bool], seconds: float, step: float = 0.05) -> bool:
    """Whether it came true within that much virtual time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        if loop.time() >= end:
            return False
        await asyncio.sleep(step)
    return True
