"""A key manager that is killed and comes back: its kernel carries packets all the while, and its new IKE SA replaces the old one at the peer."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from pathlib import Path

import pytest

from simulation import clock
from simulation.gateway import Gateway, settled
from simulation.hour import HUB, Life, configuration, far_address, hosts_of
from simulation.wire import Weather, Wire

GAP = 0.005  # s, between two packets each way: several are always under way


async def _restart_under_traffic(directory: Path, delay: float, seed: int, who: str) -> tuple[list[int], bool, dict[str, int]]:
    """How many packets were missing (at the restarted side, at its peer), whether both sides agree at the end, and what their kernels dropped."""
    life = Life(1, 0.0, 0.0, Weather(delay=(delay, delay)), seed=seed)
    wire = Wire(seed, life.weather)
    hub = Gateway(wire, [HUB], configuration(life, hub=True), directory, "hub", seed)
    site = Gateway(wire, [far_address(0)], configuration(life, hub=False), directory, "site", seed + 1)
    await hub.start()
    await site.start()
    near, far = (address.packed for address in hosts_of(0))
    numbers = itertools.count()

    async def traffic(seconds: float) -> int:
        """Both ways; returns when all have arrived that can."""
        sent = round(seconds / GAP)
        for _ in range(sent):
            number = next(numbers)
            hub.probe(0, number, near, far)
            site.probe(0, number, far, near)
            await asyncio.sleep(GAP)
        await asyncio.sleep(1.0)
        return sent

    await traffic(0.1)  # brings the tunnel up; at once if both ask, and then there is one less a moment later
    await asyncio.sleep(3.0)
    for gateway in (hub, site):
        gateway.received.clear()
    restarted, peer = (hub, site) if who == "hub" else (site, hub)
    running = asyncio.create_task(traffic(10.0))
    await asyncio.sleep(1.0)
    await restarted.restart_key_manager()
    sent = await running
    assert restarted.counters.snapshot()["ike_established"] == 1
    missing = [sent - gateway.received[0] for gateway in (restarted, peer)]
    agreed = await settled(hub, site, 1, 60.0)
    drops = {f"{gateway.name}.{name}": value for gateway in (hub, site) for name, value in gateway.engine.statistics().items() if value and "drop" in name}
    for gateway in (hub, site):
        await gateway.stop()
    return missing, agreed, drops


@pytest.mark.parametrize("delay", [0.01, 0.1], ids=["near", "far"])
@pytest.mark.parametrize("who", ["hub", "site"])
def test_no_packet_is_lost_when_a_peer_starts_anew(who: str, delay: float) -> None:
    with tempfile.TemporaryDirectory() as directory:
        missing, agreed, drops = clock.run(_restart_under_traffic(Path(directory), delay, 7, who))
    assert missing == [0, 0], drops
    assert agreed
