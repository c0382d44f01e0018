"""A stretch of two gateways' life: tunnels that are rekeyed all the time, traffic in all of them, loss and reordering on the wire."""

from __future__ import annotations

import asyncio
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from kernel_shim.model import Direction
from simulation import clock
from simulation.gateway import Gateway, settled, until
from simulation.outcome import Outcome
from simulation.wire import CLEAR, Weather, Wire

HUB: Final = IPv4Address("192.0.2.1")
QUIET: Final = 60.0  # virtual seconds that the end may take
SLICES: Final = 12  # of the life, at whose ends memory is looked at


@dataclass(frozen=True, slots=True)
class Life:
    """Times in virtual seconds. `gap` lies between two packets of a tunnel in one direction."""

    tunnels: int
    seconds: float
    gap: float
    weather: Weather
    child_rekey: int = 180
    ike_rekey: int = 600
    seed: int = 1


@dataclass(slots=True)
class LifeOutcome(Outcome):
    """Memory is that at the ends of slices."""

    numbers_repeated: int = 0  # (SA, sequence number) that were used twice
    equal: bool = False
    sas: int = 0
    ike_sas: tuple[int, int] = (0, 0)
    cpu_seconds: float = 0.0


def far_address(number: int) -> IPv4Address:
    return IPv4Address(int(IPv4Address("198.18.0.0")) + 1 + number)


def hosts_of(number: int) -> tuple[IPv4Address, IPv4Address]:
    return IPv4Address(int(IPv4Address("10.1.0.0")) + 1 + number), IPv4Address(int(IPv4Address("10.2.0.0")) + 1 + number)


def configuration(life: Life, *, hub: bool) -> str:
    """Of the hub, which has one address for all tunnels, or of the other side, which has one for each."""
    connections = []
    for number in range(life.tunnels):
        ends = (HUB, far_address(number)) if hub else (far_address(number), HUB)
        names = (f"hub{number}", f"site{number}") if hub else (f"site{number}", f"hub{number}")
        hosts = hosts_of(number) if hub else hosts_of(number)[::-1]
        connections.append(
            f"""t{number} {{
    local_addrs = {ends[0]}
    remote_addrs = {ends[1]}
    proposals = aes128gcm16-prfsha256-x25519
    rekey_time = {life.ike_rekey}s
    rand_time = {life.ike_rekey // 5}s
    mobike = no
    local {{ auth = psk
      id = {names[0]} }}
    remote {{ auth = psk
      id = {names[1]} }}
    children {{ net {{
        local_ts = {hosts[0]}/32
        remote_ts = {hosts[1]}/32
        esp_proposals = aes128gcm16-x25519
        rekey_time = {life.child_rekey}s
        rand_time = {life.child_rekey // 5}s
        life_time = {life.child_rekey * 2}s
        start_action = trap }} }}
  }}"""
        )
    return "connections {\n" + "\n".join(connections) + '\n}\nsecrets { ike-1 { secret = "the same for all" } }\n'


async def _traffic(life: Life, a: Gateway, b: Gateway, outcome: LifeOutcome, seconds: float, first: int) -> int:
    """Probes in both directions of every tunnel, evenly spread; the number after the last one."""
    hosts = [tuple(address.packed for address in hosts_of(number)) for number in range(life.tunnels)]
    step = life.gap / life.tunnels
    rounds = max(1, round(seconds / life.gap))
    for number in range(first, first + rounds):
        for tunnel, (near, far) in enumerate(hosts):
            a.probe(tunnel, number, near, far)
            b.probe(tunnel, number, far, near)
            await asyncio.sleep(step)
    outcome.sent += 2 * rounds * life.tunnels
    return first + rounds


def _received(gateways: Sequence[Gateway]) -> int:
    return sum(gateway.received.total() for gateway in gateways)


async def _live(life: Life, directory: Path) -> LifeOutcome:
    outcome, wire = LifeOutcome(), Wire(life.seed, CLEAR)
    a = Gateway(wire, [HUB], configuration(life, hub=True), directory, "hub", life.seed)
    b = Gateway(wire, [far_address(number) for number in range(life.tunnels)], configuration(life, hub=False), directory, "sites", life.seed + 1)
    await b.start()
    await a.start()
    # The first packets bring the tunnels up; they wait for that, and none may be lost.
    number = await _traffic(life, a, b, outcome, life.gap, 0)
    assert await until(lambda: _received((a, b)) == outcome.sent, QUIET), f"{_received((a, b))} of the first {outcome.sent} packets arrived"
    wire.weather = life.weather
    for _ in range(SLICES):
        number = await _traffic(life, a, b, outcome, life.seconds / SLICES, number)
        await asyncio.sleep(1.0)
        for gateway in (a, b):
            gateway.forget_probes()
        wire.forget_numbers()
        outcome.note_memory()
    wire.weather = CLEAR
    outcome.equal = await settled(a, b, life.tunnels, QUIET)
    outcome.gather((a, b), wire)
    outcome.numbers_repeated = wire.counts["esp.repeated"]
    outcome.sas = len(a.sas(Direction.OUT)) + len(a.sas(Direction.IN))
    outcome.ike_sas = (len(a.manager), len(b.manager))
    await a.stop()
    await b.stop()
    return outcome


def live(life: Life) -> LifeOutcome:
    """One life, in a loop of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with tempfile.TemporaryDirectory() as directory:
        outcome = clock.run(_live(life, Path(directory)))
    outcome.cpu_seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    return outcome
