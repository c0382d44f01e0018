"""10,000 packets over 100 CHILD policies of one peer, none of which has an SA when its packets come.

The losses are those of two whole gateways. The time from SA added to first packet out is taken from a shim process that
the bench drives as its key manager: from the moment when ADD is sent until the kernel's time stamp of the first ESP packet
of that SPI on the wire, so the way through the channel is in it.
"""

from __future__ import annotations

import asyncio
import os
import time
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from lab.capture import Capture
from lab.pairing import OURS, pair
from lab.topology import WAN, Site, Sites, sites
from lab.traffic import Received, UdpStream, ping, udp_sink
from lab.tunnel import Side, Tunnel
from shim_rig import GCM, Shim

from bench.rows import Row
from kernel_shim.model import (
    Action,
    AddressRange,
    Direction,
    Mode,
    Policy,
    ReqId,
    SecurityAssociation,
    Selector,
    Spi,
    Template,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret

POLICIES: Final = 100
PACKETS: Final = 10_000
RATE: Final = 20_000.0  # all in half a second, before most of the SAs stand
RUNS: Final = 3
CEILING_MS: Final = 5.0


def _network(number: int) -> IPv4Network:
    return IPv4Network(f"10.2.{number + 1}.0/24")


def _targets(port: int) -> list[tuple[IPv4Address, int]]:
    return [(_network(number)[10], port) for number in range(POLICIES)]


def _reach_all(far: Site) -> None:
    """Host B answers to an address in each network, and its neighbour is known, so that no queue but ours can lose a packet."""
    far.host.ip("link set lo up", *(f"addr add {_network(number)[10]}/32 dev lo" for number in range(POLICIES)))
    far.gateway.ip(*(f"route add {_network(number)} via {far.host4}" for number in range(POLICIES)))
    ping(far.gateway, far.host4, count=1)


def whole_gateways() -> Received:
    """The account of host B."""
    more = {f"net{number}": ("10.1.0.0/16", str(_network(number))) for number in range(1, POLICIES)}
    tunnel = Tunnel(ts_a="10.1.0.0/16", ts_b=str(_network(0)), start_a="trap", more_children=more)
    with pair(OURS, OURS, tunnel) as link:
        _reach_all(link.sites.b)
        near, far, _ = link.ends(Side.A)
        with udp_sink(far, IPv4Address("0.0.0.0")) as sink:
            sent = UdpStream(near, _targets(sink.port), count=PACKETS // POLICIES, rate=RATE).wait()
            got = sink.expect(sent.sent, timeout=30.0)
        if leaks := link.leaks():
            raise RuntimeError(f"{len(leaks)} packets in clear on the wire: {leaks[0]}")
        return got


def _policy(places: Sites, number: int, side: Side) -> list[Policy]:
    here, there = places.a.wan4, places.b.wan4
    selector = Selector(AddressRange.of(places.a.net4), AddressRange.of(_network(number)))
    template = (Template(Mode.TUNNEL, ReqId(number + 1), here, there),)
    directions = [Direction.OUT] if side is Side.A else [Direction.IN, Direction.FORWARD]
    return [Policy(selector, direction, Action.PROTECT, 100, template) for direction in directions]


def _association(places: Sites, number: int, run: int, direction: Direction) -> SecurityAssociation:
    spi = Spi(0x10000 * (run + 1) + number)
    key = Secret(spi.to_bytes(4, "big") * 5)
    reqid = ReqId(number + 1)
    return SecurityAssociation(spi, places.a.wan4, places.b.wan4, direction, Mode.TUNNEL, reqid, GCM, key, encapsulation=UdpEncapsulation(), esn=True)


async def _release_times(run: int) -> list[float]:
    """Milliseconds from ADD to the first packet, by policy."""
    with sites() as places:
        a, b = (Shim(places.lab, site.gateway) for site in (places.a, places.b))
        _reach_all(places.b)
        async with a.channel() as left, b.channel() as right:
            for channel, site, side in ((left, places.a, Side.A), (right, places.b, Side.B)):
                for descriptor in await channel.bind(site.wan4):
                    os.close(descriptor)
                for number in range(POLICIES):
                    for policy in _policy(places, number, side):
                        await channel.update_policy(policy)
            for number in range(POLICIES):
                await right.add_sa(_association(places, number, run, Direction.IN))
            with Capture(places.a.gateway, WAN) as capture, udp_sink(places.b.host, IPv4Address("0.0.0.0")) as sink:
                sent = UdpStream(places.a.host, _targets(sink.port), count=PACKETS // POLICIES, rate=RATE).wait()
                asked: dict[int, float] = {}
                for number in range(POLICIES):
                    association = _association(places, number, run, Direction.OUT)
                    asked[association.spi] = time.time()
                    await left.add_sa(association)
                got = await asyncio.get_running_loop().run_in_executor(None, sink.expect, sent.sent)
                if (got.received, got.reordered) != (sent.sent, 0):
                    raise RuntimeError(f"{sent.sent - got.received} lost, {got.reordered} out of order: {a.counters()}")
                first: dict[int, float] = {}
                for packet in capture.packets():
                    if packet.esp_spi is not None:
                        first.setdefault(packet.esp_spi, packet.time)
                return [(first[spi] - begun) * 1000 for spi, begun in asked.items()]


def _percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def run() -> list[Row]:
    got = whole_gateways()
    lost, reordered = float(PACKETS - got.received), float(got.reordered)
    p99 = [_percentile(asyncio.run(_release_times(number)), 0.99) for number in range(RUNS)]
    return [
        Row("pending-burst.lost", "packets", "low", lost, floor=0.0, aim=0.0, runs_ours=(lost,)),
        Row("pending-burst.reordered", "packets", "low", reordered, floor=0.0, aim=0.0, runs_ours=(reordered,)),
        Row(
            "pending-burst.release-p99", "ms", "low", sorted(p99)[RUNS // 2], floor=CEILING_MS, aim=2.0, runs_ours=p99, note="ADD sent to first ESP on the wire"
        ),
    ]
