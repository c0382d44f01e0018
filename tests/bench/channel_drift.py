"""Rows `channel-drift`: many tunnels over a channel that loses a tenth of every message class and is cut again and again.

Drift is what the kernel has and should not have, and what it lacks: policies by selector and content, SAs by id. It is counted in the kernel
itself, not asked for over the channel.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from dataplane_pair import Gateway
from lab.channel_proxy import ChannelProxy
from pfkey_support import SocketEdge
from shim_rig import GCM

from bench.rows import Row
from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.dataplane.engine import Engine
from kernel_shim.model import (
    Action,
    AddressRange,
    Direction,
    KernelError,
    Mode,
    Policy,
    ReqId,
    SaId,
    SaState,
    SecurityAssociation,
    Spi,
    SpiRequest,
    TrafficSelector,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret
from vpnd.daemon.kernel_side import KernelSide
from vpnd.policies import PolicySpec, policies_for
from vpnd.telemetry.counters import Counters

TUNNELS: Final = 1000
LOSS: Final = 0.1
CUTS: Final = 20
BUILDERS: Final = 32  # tunnels that are negotiated at a time
HERE: Final = IPv4Address("192.0.2.1")
AUDIT_PAUSE: Final = 1.0  # s; the daemon's own audits are minutes apart
REPAIR_LIMIT: Final = 300.0  # s
CEILING_SECONDS: Final = 60.0

_OUR_NETWORK: Final = (TrafficSelector(AddressRange.of(IPv4Network("10.1.0.0/16"))),)


@dataclass
class Outcome:
    """`drift` by kind, once all is quiet; `repair_seconds` from the last disturbance until there was none."""

    drift: int = 0
    repair_seconds: float = 0.0
    build_seconds: float = 0.0
    lost_messages: int = 0
    cuts: int = 0
    counters: dict[str, int] = field(default_factory=dict)


class KeyManager:
    """Builds tunnels with keys of its own making; what the kernel loses is built anew."""

    def __init__(self, side: KernelSide, seed: int) -> None:
        self._side = side
        self._draw = random.Random(seed)
        self._owners: dict[SaId, int] = {}
        self.standing: dict[int, tuple[SaId, SaId]] = {}
        self.todo: asyncio.Queue[int] = asyncio.Queue()
        side.lost = self._lost

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
        peer = IPv4Address(int(IPv4Address("198.18.0.0")) + number)
        theirs = (TrafficSelector(AddressRange.of(IPv4Network((int(IPv4Address("10.128.0.0")) + (number << 8), 24)))),)
        reqid = ReqId(number + 1)
        if not self._side.has_claims(number):
            wanted = policies_for(PolicySpec(Action.PROTECT, Mode.TUNNEL, reqid, HERE, peer), _OUR_NETWORK, theirs)
            await self._side.claim(number, list(wanted))
        for old in self.standing.pop(number, ()):
            self._owners.pop(old, None)
            await self._side.remove(old)
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

    def _association(self, spi: Spi, source: IPv4Address, destination: IPv4Address, direction: Direction, reqid: ReqId) -> SecurityAssociation:
        key = Secret(self._draw.randbytes(20))
        return SecurityAssociation(spi, source, destination, direction, Mode.TUNNEL, reqid, GCM, key, encapsulation=UdpEncapsulation())


def drift(engine: Engine, side: KernelSide, manager: KeyManager) -> int:
    """How many entries of the kernel's tables are wrong or missing. A larval SA is none: it goes by itself."""

    def shape(policy: Policy) -> tuple[object, ...]:
        return (policy.direction, policy.selector, policy.action, policy.priority, policy.templates, policy.unresolved)

    wanted, actual = {shape(policy) for policy in side.table.desired()}, {shape(policy) for policy in engine.policies()}
    owned = {sa for pair in manager.standing.values() for sa in pair}
    sas = {status.sa.id for status in engine.sas() if status.state is not SaState.LARVAL}
    return len(wanted ^ actual) + len(owned ^ sas)


async def scenario(directory: Path, *, tunnels: int, loss: float, cuts: int, seed: int = 1, pause: float = 0.5) -> Outcome:
    """Builds the tunnels and keeps them while the channel is cut `cuts` times, one half of them meanwhile, each as soon as it stands again.

    With each cut a hand in the kernel takes away some of what stands, untold.
    """
    engine = Gateway(seed).engine
    edge = SocketEdge(directory / "kernel", engine)
    proxy = ChannelProxy(directory / "proxy", directory / "kernel", loss=loss, seed=seed)
    counters, draw, outcome = Counters(), random.Random(seed), Outcome()

    async def connect() -> KernelChannel:
        channel = PfKeyChannel(directory / "proxy")
        await channel.open()
        return channel

    side = KernelSide(connect, counters)
    manager = KeyManager(side, seed)
    workers: list[asyncio.Task[None]] = []
    try:
        while not side.connected:
            with suppress(TimeoutError, OSError, KernelError):
                await side.open()
        began = time.monotonic()
        for number in range(tunnels):
            manager.todo.put_nowait(number)
        workers += [asyncio.create_task(manager.work()) for _ in range(BUILDERS)]
        for cut in range(cuts):
            await asyncio.sleep(pause)
            async with asyncio.timeout(REPAIR_LIMIT):
                if cut == cuts // 2:
                    await manager.todo.join()
                    outcome.build_seconds = time.monotonic() - began
                while not side.connected:
                    await asyncio.sleep(0.01)
            proxy.cut()
            _take_away(engine, draw)
        disturbed = time.monotonic()
        async with asyncio.timeout(REPAIR_LIMIT):
            await manager.todo.join()
            while not side.connected or manager.todo.qsize() or drift(engine, side, manager):
                await asyncio.sleep(AUDIT_PAUSE)
                if side.connected:
                    await side.audit()
                await manager.todo.join()
        outcome.repair_seconds = time.monotonic() - disturbed
    except TimeoutError:
        outcome.repair_seconds = REPAIR_LIMIT
    finally:
        outcome.drift = drift(engine, side, manager) + (tunnels - len(manager.standing))
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await side.close(leave=True)
        proxy.close()
        edge.close()
    outcome.lost_messages, outcome.cuts, outcome.counters = proxy.lost, proxy.cuts, dict(counters.snapshot())
    return outcome


def _take_away(engine: Engine, draw: random.Random) -> None:
    """What an expiry of which the notice was lost does, and an administrator."""
    for status in engine.sas():
        if status.state is not SaState.LARVAL and draw.random() < 0.005:
            engine.delete_sa(status.sa.id)
    for policy in engine.policies():
        if draw.random() < 0.005:
            engine.delete_policy(policy.direction, policy.selector)


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        got = asyncio.run(scenario(Path(directory), tunnels=TUNNELS, loss=LOSS, cuts=CUTS))
    told = f"{got.lost_messages:,} messages lost, {got.cuts} cuts; built in {got.build_seconds:.0f} s"
    repairs = ", ".join(f"{name.removeprefix('kernel_')} {value}" for name, value in sorted(got.counters.items()))
    return [
        Row("channel-drift.drift", "entries", "low", float(got.drift), floor=0.0, aim=0.0, note=told),
        Row("channel-drift.repair", "s", "low", round(got.repair_seconds, 1), floor=CEILING_SECONDS, aim=20.0, note=repairs),
    ]
