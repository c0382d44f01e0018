"""Many tunnels over a channel that loses a part of every message class and is disturbed again and again; what is wrong in the kernel at the end.

Drift is what the kernel has and should not have, and what it lacks: policies by selector and content, SAs by id. It is counted in the kernel
itself, not asked for over the channel that loses.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final, Protocol

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.model import (
    Acquire,
    Action,
    AddressRange,
    Direction,
    KernelError,
    KernelEvent,
    Mode,
    Policy,
    ReqId,
    SaId,
    SecurityAssociation,
    Spi,
    SpiRequest,
    TrafficSelector,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret
from vpnd.daemon.audit import policy_drift
from vpnd.daemon.kernel_side import KernelSide
from vpnd.policies import PolicySpec, policies_for
from vpnd.telemetry.counters import Counters

HERE: Final = IPv4Address("192.0.2.1")
OUR_NETWORK: Final = IPv4Network("10.1.0.0/16")
BUILDERS: Final = 32  # tunnels that are negotiated at a time
AUDIT_PAUSE: Final = 1.0  # s; the daemon's own audits are minutes apart
REPAIR_LIMIT: Final = 300.0  # s
TAKEN_AWAY: Final = 0.005  # of what stands, at each disturbance

_OURS: Final = (TrafficSelector(AddressRange.of(OUR_NETWORK)),)


@dataclass(frozen=True, slots=True)
class Tables:
    """What a kernel has of ours, larval SAs aside: they go by themselves."""

    policies: Sequence[Policy]
    sas: frozenset[SaId]


class Bed(Protocol):
    """A kernel with a lossy way to it. `algorithm` None: it has no ESP, and policies alone are looked at."""

    algorithm: EspAlgorithm | None
    encapsulated: bool
    asks: bool  # whether packets can be sent

    async def connect(self) -> KernelChannel: ...
    async def disturb(self, traps: Collection[int]) -> None:
        """One overrun, or cut, of the channel, while packets to the tunnels `traps` ask for SAs."""

    async def send(self, traps: Collection[int]) -> None:
        """A packet to each. Where the larval SA of one before stands, it asks for nothing."""

    async def tables(self) -> Tables:
        """Read past the lossy way, as is `take_away`."""

    async def take_away(self, policies: Sequence[Policy], sas: Sequence[SaId]) -> None: ...
    def lost_messages(self) -> int: ...


@dataclass
class Outcome:
    """`drift` once all is quiet; `repair_seconds` from the last disturbance until there was none.

    `unheard`: tunnels whose last packet nobody was told of by then.
    """

    tunnels: int = 0
    traps: int = 0
    drift: int = 0
    repair_seconds: float = 0.0
    build_seconds: float = 0.0
    lost_messages: int = 0
    disturbances: int = 0
    acquires: int = 0
    unheard: int = 0
    counters: dict[str, int] = field(default_factory=dict)


class KeyManager:
    """Builds tunnels with keys of its own making; what the kernel loses is built anew."""

    def __init__(self, side: KernelSide, bed: Bed, seed: int) -> None:
        self._side = side
        self._bed = bed
        self._draw = random.Random(seed)
        self._owners: dict[SaId, int] = {}
        self.standing: dict[int, tuple[SaId, ...]] = {}
        self.todo: asyncio.Queue[int] = asyncio.Queue()
        self.unheard: set[int] = set()  # trapped tunnels that a packet asked for
        self.acquires = 0
        self._refusals: dict[asyncio.Task[None], int] = {}  # with the tunnel that asked
        side.lost = self._lost
        side.event = self._heard

    async def trap(self, number: int) -> None:
        """Its policies, and never an SA: each ACQUIRE is refused, so that the next packet asks again."""
        while not self._side.has_claims(number):
            with suppress(KernelError, TimeoutError, ChannelClosed):
                await self._claim(number)

    def ask(self, traps: Sequence[int]) -> list[int]:
        """Those for which a packet must now be heard of: the larval SA of the last one is gone."""
        ready = [number for number in traps if number not in self.unheard and number not in self._refusals.values()]
        self.unheard.update(ready)
        self.acquires += len(ready)
        return ready

    def _heard(self, event: KernelEvent) -> None:
        if not isinstance(event, Acquire):
            return
        number = event.reqid - 1
        self.unheard.discard(number)
        # Also one that the kernel's hold queue asks of its own accord: its larval SA would stand in the way of the next.
        task = asyncio.create_task(self._side.acquire_failed(event.sequence, errno.EHOSTUNREACH))
        self._refusals[task] = number
        task.add_done_callback(self._refusals.pop)

    def _lost(self, ids: Sequence[SaId]) -> None:
        for number in {self._owners[sa] for sa in ids if sa in self._owners}:
            if number in self.standing:
                self.todo.put_nowait(number)

    async def work(self) -> None:
        while True:
            number = await self.todo.get()
            try:
                await self._build(number)
            except (KernelError, TimeoutError, ChannelClosed):
                await asyncio.sleep(0.05)
                self.todo.put_nowait(number)
            finally:
                self.todo.task_done()

    async def _build(self, number: int) -> None:
        peer, reqid = peer_of(number), ReqId(number + 1)
        if not self._side.has_claims(number):
            await self._claim(number)
        for old in self.standing.pop(number, ()):
            self._owners.pop(old, None)
            await self._side.remove(old)
        if self._bed.algorithm is None:
            self.standing[number] = ()
            return
        spi = await self._side.get_spi(SpiRequest(peer, HERE, Mode.TUNNEL, reqid))
        inbound = self._association(spi, peer, HERE, Direction.IN, reqid)
        outbound = self._association(Spi(self._draw.randrange(0x1000, 1 << 32)), HERE, peer, Direction.OUT, reqid)
        try:
            await self._side.install(inbound)
            await self._side.install(outbound)
        except (KernelError, TimeoutError, ChannelClosed):
            await self._side.remove(inbound.id)
            raise
        self.standing[number] = (inbound.id, outbound.id)
        self._owners |= {inbound.id: number, outbound.id: number}

    async def _claim(self, number: int) -> None:
        theirs = (TrafficSelector(AddressRange.of(network_of(number))),)
        spec = PolicySpec(Action.PROTECT, Mode.TUNNEL, ReqId(number + 1), HERE, peer_of(number))
        await self._side.claim(number, list(policies_for(spec, _OURS, theirs)))

    def _association(self, spi: Spi, source: IPv4Address, destination: IPv4Address, direction: Direction, reqid: ReqId) -> SecurityAssociation:
        algorithm = self._bed.algorithm
        assert algorithm is not None
        encryption, integrity = (Secret(self._draw.randbytes(size)) for size in (algorithm.encryption_key_length, algorithm.integrity_key_length))
        encapsulation = UdpEncapsulation() if self._bed.encapsulated else None
        return SecurityAssociation(
            spi, source, destination, direction, Mode.TUNNEL, reqid, algorithm, encryption, integrity, encapsulation=encapsulation, replay_window=32
        )


def peer_of(number: int) -> IPv4Address:
    return IPv4Address(int(IPv4Address("198.18.0.0")) + number)


def network_of(number: int) -> IPv4Network:
    return IPv4Network((int(IPv4Address("10.128.0.0")) + (number << 8), 24))


async def drift(bed: Bed, side: KernelSide, manager: KeyManager) -> int:
    """How many entries of the kernel's tables are wrong or missing."""
    actual = await bed.tables()
    policies = policy_drift({(policy.direction, policy.selector): policy for policy in actual.policies}, side.table.desired(), ())
    owned = {sa for pair in manager.standing.values() for sa in pair}
    return len(policies.missing | policies.foreign) + len(owned ^ actual.sas)


async def scenario(bed: Bed, *, tunnels: int, disturbances: int, traps: int, seed: int = 1, pause: float = 0.5) -> Outcome:
    """Builds the tunnels and keeps them while the channel is disturbed, one half of the times meanwhile, each as soon as it stands again.

    Beside them stand `traps`, for which packets ask at each disturbance. With each a hand in the kernel takes away some of what stands, untold.
    """
    counters, draw = Counters(), random.Random(seed)
    outcome = Outcome(tunnels=tunnels, traps=traps, disturbances=disturbances)
    side = KernelSide(bed.connect, counters)
    manager = KeyManager(side, bed, seed)
    workers: list[asyncio.Task[None]] = []
    try:
        while not side.connected:
            with suppress(TimeoutError, ConnectionError, KernelError):
                await side.open()
        trapped = range(tunnels, tunnels + traps)
        await asyncio.gather(*(manager.trap(number) for number in trapped))
        began = time.monotonic()
        for number in range(tunnels):
            manager.todo.put_nowait(number)
        workers += [asyncio.create_task(manager.work()) for _ in range(BUILDERS)]
        for number in range(disturbances):
            await asyncio.sleep(pause)
            async with asyncio.timeout(REPAIR_LIMIT):
                if number == disturbances // 2:
                    await manager.todo.join()
                    outcome.build_seconds = time.monotonic() - began
                while not side.connected:
                    await asyncio.sleep(0.01)
            await bed.disturb(manager.ask(trapped) if bed.asks else ())
            standing = await bed.tables()
            # What a trap waits for must come: a packet that meets no policy asks for nothing.
            spared = {template.reqid for policy in standing.policies for template in policy.templates if template.reqid - 1 in trapped}
            policies = [it for it in standing.policies if not any(template.reqid in spared for template in it.templates) and draw.random() < TAKEN_AWAY]
            await bed.take_away(policies, [sa for sa in sorted(standing.sas) if draw.random() < TAKEN_AWAY])
        disturbed = time.monotonic()
        async with asyncio.timeout(REPAIR_LIMIT):
            await manager.todo.join()
            while not side.connected or manager.todo.qsize() or manager.unheard or await drift(bed, side, manager):
                await asyncio.sleep(AUDIT_PAUSE)
                await bed.send(manager.unheard)
                if side.connected:
                    await side.audit()
                await manager.todo.join()
        outcome.repair_seconds = time.monotonic() - disturbed
    except TimeoutError:
        outcome.repair_seconds = REPAIR_LIMIT
    finally:
        outcome.drift = await drift(bed, side, manager) + (tunnels - len(manager.standing))
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await side.close(leave=True)
    outcome.acquires, outcome.unheard = manager.acquires, len(manager.unheard)
    outcome.lost_messages, outcome.counters = bed.lost_messages(), dict(counters.snapshot())
    return outcome
