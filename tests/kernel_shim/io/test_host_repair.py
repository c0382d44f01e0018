"""An administrator or another daemon takes away what keeps the host closed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from lab.capture import Capture
from lab.namespaces import Namespace
from lab.process import wait_until
from lab.topology import LAN, WAN, Sites, sites
from lab.traffic import UdpStream, ping, udp_sink
from shim_rig import Shim, connect, host_state, policies

pytestmark = pytest.mark.pair

RULES = "ip {0} rule | grep -vE '^(0|32766|32767):' | cut -d: -f1 | sort -u | while read p; do while ip {0} rule del priority $p 2>/dev/null; do :; done; done"
REMOVALS = {
    "a firewall is reloaded": "nft flush ruleset",
    "the guard's rules are flushed": "for t in $(nft list tables | cut -d' ' -f3); do nft flush table inet $t; done",
    "rules are taken away": f"{RULES.format('-4')}; {RULES.format('-6')}",
    "routes are taken away": "ip route flush proto 178 table all; ip -6 route flush proto 178 table all",
    "the interface goes down and up": "ip link set vpn0 down; ip link set vpn0 up",
}
UNROUTED = ("rules are taken away", "routes are taken away")
LEAKS = re.compile(r"counter leak_dropped \{\s*packets (\d+)")


def without_guard(state: dict[str, str]) -> dict[str, str]:
    """Counters of the guard go on counting."""
    return {**state, "nftables": ""}


def kept_in(gateway: Namespace) -> int:
    """Packets that the guard dropped because they would have left in clear."""
    return sum(map(int, LEAKS.findall(gateway.run(["nft", "list", "counters"]).stdout)))


@contextlib.contextmanager
def traffic(both: Sites) -> Iterator[None]:
    """From a host behind the gateway and from the gateway itself, without a pause."""
    with udp_sink(both.b.host, both.b.host4) as sink:
        target = [(both.b.host4, sink.port)]
        streams = [
            UdpStream(both.a.host, target, count=60_000, rate=2000),
            UdpStream(both.a.gateway, target, count=60_000, rate=2000, source=both.a.net4[1]),
        ]
        try:
            sink.expect(200)
            yield
        finally:
            for stream in streams:
                stream.abandon()


@pytest.mark.parametrize("what", REMOVALS)
async def test_what_is_taken_away_is_put_again(what: str) -> None:
    with sites() as both:
        gateway = both.a.gateway
        before = host_state(gateway)
        a, b = Shim(both.lab, gateway), Shim(both.lab, both.b.gateway)
        await connect(a, b, both.a, both.b)
        async with a.channel() as channel:
            for policy in policies(both.a.wan6, both.b.wan6, both.a.net6, both.b.net6):
                await channel.add_policy(policy)
        assert ping(both.a.host, both.b.host4).lost == 0
        closed = host_state(gateway)
        assert a.counters()["capture.repairs"] == 0, "its own changes are not others'"
        with Capture(gateway, WAN) as wire, traffic(both):
            # Where only the guard is left it has to hold something first: the shim may be back before the next packet.
            with a.halted() if what in UNROUTED else contextlib.nullcontext():
                gateway.run(["sh", "-c", REMOVALS[what]])
                wait_until(lambda: what not in UNROUTED or kept_in(gateway) > 0, "the guard keeps packets in")
            wait_until(lambda: a.counters()["capture.repairs"] > 0 and without_guard(host_state(gateway)) == without_guard(closed), "everything is back")
            wait_until(lambda: ping(both.a.host, both.b.host4, timeout=1.0).lost == 0, "traffic passes as before")
            assert wire.clear_packets(both.inner_networks) == []
        if what in UNROUTED:
            assert a.counters()["guard.leak-dropped.packets"] > 0
        assert ping(both.a.host, both.b.host4).lost == 0, "and behind the last datagrams, whose port is closed by now"
        with Capture(gateway, WAN) as wire, Capture(gateway, LAN) as inside:
            assert b.stop() == 0  # what comes from the other site now comes in clear
            assert ping(both.b.host, both.a.host4, timeout=0.3).received == 0
            assert not [packet for packet in inside.packets() if packet.source in both.b.net4]
            assert wire.clear_packets(both.inner_networks) != []
        async with a.channel() as channel:
            for policy in policies(both.a.wan4, both.b.wan4, both.a.net4, ip_network("10.77.0.0/16")):
                await channel.add_policy(policy)
        assert a.stop() == 0
        assert host_state(gateway) == before


@pytest.mark.parametrize("what", UNROUTED)
async def test_nothing_leaves_in_clear_when_nobody_is_there_to_put_it_again(what: str) -> None:
    with sites() as both:
        before = host_state(both.a.gateway)
        a, b = Shim(both.lab, both.a.gateway), Shim(both.lab, both.b.gateway)
        await connect(a, b, both.a, both.b)
        assert ping(both.a.host, both.b.host4).lost == 0
        a.kill()
        with Capture(both.a.gateway, WAN) as wire:
            both.a.gateway.run(["sh", "-c", REMOVALS[what]])
            for host, source in ((both.a.host, both.a.host4), (both.a.gateway, both.a.net4[1])):
                assert ping(host, both.b.host4, timeout=0.2, source=source).received == 0
            assert ping(both.a.gateway, both.b.wan4).lost == 0, "what no policy is about passes"
            assert wire.clear_packets(both.inner_networks) == []
        a.restart()
        await connect(a, b, both.a, both.b, round_number=1)
        wait_until(lambda: ping(both.a.host, both.b.host4, timeout=1.0).lost == 0, "traffic passes as before")
        assert a.stop() == 0
        assert host_state(both.a.gateway) == before
