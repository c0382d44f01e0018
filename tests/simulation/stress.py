"""Both gateways begin something on every tunnel at the same moment, over and over, on a wire that loses, doubles and reorders what they say.

After each storm comes a calm, in which all must be as it should: one CHILD_SA for each tunnel, the same on both sides, the SADs and what the daemons know
of them alike, and nothing left to do. At the end everything is deleted, and nothing may be left of it.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from kernel_shim.model import Direction, SaState
from simulation import clock
from simulation.gateway import Gateway, settled, until
from simulation.hour import HUB, Life, configuration, far_address, hosts_of
from simulation.outcome import Outcome
from simulation.wire import CLEAR, Weather, Wire
from vpnd.daemon.entry import Entry
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.effects import Reason
from vpnd.ike.sa import ChildSaState, IkeSaState

NEVER: Final = 1_000_000  # s, between rekeyings that nobody asked for
CALM: Final = 400.0  # virtual seconds that it may take until all is as it should be
PATIENT: Final = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.3, tries=20))  # no peer is given up, whatever the wire loses


class Act(Enum):
    """What a side begins on a tunnel."""

    NOTHING = "nothing"
    REKEY_CHILD = "rekey child"
    REKEY_IKE = "rekey IKE"
    REAUTHENTICATE = "reauthenticate"
    DELETE_CHILD = "delete child"


REKEYING: Final = (Act.REKEY_CHILD, Act.REKEY_CHILD, Act.REKEY_IKE)
EVERYTHING: Final = (*REKEYING, Act.NOTHING, Act.REAUTHENTICATE, Act.DELETE_CHILD)


@dataclass(frozen=True, slots=True)
class Storm:
    """`acts`: what a side picks from, each time. `waves` in a storm follow each other within seconds; `apart`: the two sides of a wave, at most."""

    weather: Weather
    acts: tuple[Act, ...] = REKEYING
    tunnels: int = 8
    storms: int = 4
    waves: int = 3
    apart: float = 0.03
    between: float = 2.0
    gap: float = 0.25  # s, between two packets of a tunnel in one direction
    seed: int = 1


@dataclass(slots=True)
class StormOutcome(Outcome):
    """`faults`: what was not as it should be, and when. Memory is that after each storm."""

    ike_lost: int = 0
    faults: list[str] = field(default_factory=list)


def tunnel_faults(gateways: tuple[Gateway, Gateway], tunnels: int) -> Iterator[str]:
    """What a quiet gateway should not have."""
    for gateway in gateways:
        entries = [entry for entry in gateway.manager.entries() if not entry.sa.closed]
        by_tunnel = Counter(entry.sa.connection.name for entry in entries)
        for name in (f"t{number}" for number in range(tunnels)):
            if by_tunnel[name] != 1:
                yield f"{gateway.name}: {by_tunnel[name]} IKE SAs of {name}"
        known = set()
        for entry in entries:
            sa = entry.sa
            states = [child.state for child in sa.children.values()]
            if sa.state is not IkeSaState.ESTABLISHED or states != [ChildSaState.INSTALLED]:
                yield f"{gateway.name}: {sa.connection.name} is {sa.state.value} with {[state.value for state in states]}"
            if sa.tasks_active or sa.tasks_queued or sa.postponed or sa.held:
                yield f"{gateway.name}: {sa.connection.name} is not done: {sa.tasks_active} {sa.tasks_queued} {len(sa.postponed)} {sa.held}"
            known |= {sa_id for child in sa.children.values() for sa_id in (child.sa.inbound.id, child.sa.outbound.id)}
        standing = {status.sa.id for status in gateway.engine.sas()}
        if known != standing:
            yield f"{gateway.name}: the kernel has {len(standing - known)} SAs that the daemon does not know, and lacks {len(known - standing)}"


def leftovers(gateways: tuple[Gateway, Gateway]) -> Iterator[str]:
    for gateway in gateways:
        if len(gateway.manager):
            yield f"{gateway.name}: {len(gateway.manager)} IKE SAs are left"
        if left := list(gateway.engine.sas()):
            yield f"{gateway.name}: {len(left)} SAs are left, {sum(status.state is SaState.LARVAL for status in left)} of them larval"


class _Running:
    def __init__(self, storm: Storm, directory: Path) -> None:
        self.storm = storm
        self.outcome = StormOutcome()
        self.dice = random.Random(storm.seed)
        self.wire = Wire(storm.seed, CLEAR)
        life = Life(storm.tunnels, 0.0, storm.gap, storm.weather, NEVER, NEVER, storm.seed)
        addresses = [far_address(number) for number in range(storm.tunnels)]
        self.a = Gateway(self.wire, [HUB], configuration(life, hub=True), directory, "hub", storm.seed, PATIENT)
        self.b = Gateway(self.wire, addresses, configuration(life, hub=False), directory, "sites", storm.seed + 1, PATIENT)
        self.both = self.a, self.b
        self._talking = True
        self._hosts = [tuple(address.packed for address in hosts_of(number)) for number in range(storm.tunnels)]

    async def run(self) -> StormOutcome:
        storm, outcome = self.storm, self.outcome
        await self.b.start()
        await self.a.start()
        talk = asyncio.ensure_future(self._talk())
        await self._calm("at the start")
        for number in range(storm.storms):
            self.wire.weather = storm.weather
            for _ in range(storm.waves):
                await self._wave()
                await asyncio.sleep(self.dice.uniform(0.0, storm.between))
            self.wire.weather = CLEAR
            await self._calm(f"after storm {number}")
            outcome.note_memory()
        self._talking = False
        await talk
        await asyncio.sleep(10.0)
        await self._end()
        outcome.gather(self.both, self.wire)
        outcome.ike_lost = self.wire.counts["ike.lost"]
        for gateway in self.both:
            await gateway.stop()
        return outcome

    async def _talk(self) -> None:
        number = 0
        while self._talking:
            for tunnel, (near, far) in enumerate(self._hosts):
                self.a.probe(tunnel, number, near, far)
                self.b.probe(tunnel, number, far, near)
                self.outcome.sent += 2
            number += 1
            await asyncio.sleep(self.storm.gap)

    async def _wave(self) -> None:
        loop, storm = asyncio.get_running_loop(), self.storm
        for gateway in self.both:
            for tunnel in range(storm.tunnels):
                loop.call_later(self.dice.uniform(0.0, storm.apart), self._begin, gateway, f"t{tunnel}", self.dice.choice(storm.acts))
        await asyncio.sleep(storm.apart)

    def _begin(self, gateway: Gateway, tunnel: str, act: Act) -> None:
        match act:
            case Act.REKEY_CHILD:
                gateway.operations.rekey(child="net", ike=tunnel)
            case Act.REKEY_IKE:
                gateway.operations.rekey(ike=tunnel)
            case Act.REAUTHENTICATE:
                gateway.operations.rekey(ike=tunnel, reauth=True)
            case Act.DELETE_CHILD:
                self._each(gateway, lambda entry: self._delete_children(gateway, entry), tunnel)

    @staticmethod
    def _delete_children(gateway: Gateway, entry: Entry) -> None:
        for child in list(entry.sa.children):
            gateway.demands.ends.end(entry, child, reason=Reason.DELETED)

    def _each(self, gateway: Gateway, do: Callable[[Entry], object], tunnel: str | None = None) -> None:
        for entry in list(gateway.manager.entries()):
            if tunnel in (None, entry.sa.connection.name):
                do(entry)

    async def _calm(self, when: str) -> None:
        tunnels, loop = self.storm.tunnels, asyncio.get_running_loop()
        begun = loop.time()
        await until(lambda: not any(tunnel_faults(self.both, tunnels)) and self._equal(), CALM, step=1.0)
        if not await settled(self.a, self.b, tunnels, 10.0):
            self.outcome.faults.append(f"{when}, after {loop.time() - begun:.0f} s: the SADs differ")
        self.outcome.faults += [f"{when}, after {loop.time() - begun:.0f} s: {fault}" for fault in tunnel_faults(self.both, tunnels)]

    def _equal(self) -> bool:
        return all(near.sas(Direction.OUT) == far.sas(Direction.IN) for near, far in (self.both, self.both[::-1]))

    async def _end(self) -> None:
        """One side deletes all there is."""
        now = asyncio.get_running_loop().time()
        self._each(self.a, lambda entry: self.a.manager.run(entry, entry.sa.delete(now)))
        await until(lambda: not any(leftovers(self.both)), CALM, step=1.0)
        self.outcome.faults += [f"at the end: {fault}" for fault in leftovers(self.both)]


def rage(storm: Storm) -> StormOutcome:
    """All storms of it, in a loop of its own."""
    with tempfile.TemporaryDirectory() as directory:

        async def run() -> StormOutcome:
            return await _Running(storm, Path(directory)).run()

        return clock.run(run())
