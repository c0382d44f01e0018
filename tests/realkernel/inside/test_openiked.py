"""OpenIKED on Linux's AF_KEY, with all defaults on both sides: tunnels that carry, and go on carrying when either side rekeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.openiked import OpenIked
from lab.pairing import OURS, DaemonFactory, Pair
from lab.process import wait_until
from lab.tunnel import CHILD, CONNECTION, Side, Tunnel
from realkernel.kernel_gateways import KernelPair, kernel_pair, xfrm

pytestmark = [pytest.mark.realkernel, pytest.mark.timeout(300)]

SECONDS = 60.0  # for what takes less than one on a machine that is not emulated
DEFAULTS = Tunnel(proposals="default", esp_proposals="default")
NEW = "192.0.2.77"


def openiked(lifetimes: str = "") -> DaemonFactory:
    return lambda namespace, config: OpenIked(namespace, config, lifetimes=lifetimes)


def up(link: Pair) -> None:
    link.a.initiate(timeout=SECONDS)
    link.b.wait_child(timeout=SECONDS)


def carries(both: KernelPair) -> None:
    for side in Side:
        assert both.link.ping(side).lost == 0
    assert both.leaks() == []


def move(link: Pair) -> None:
    a, b = link.sites.a, link.sites.b
    a.gateway.sysctl(ipv4__conf__wan__promote_secondaries=1)  # else the new address goes with the old one
    a.gateway.ip(f"addr add {NEW}/24 dev wan", f"addr del {a.wan4}/24 dev wan", f"route replace {b.net4} via {b.wan4}")
    b.gateway.ip(f"route replace {a.net4} via {NEW}")
    wait_until(lambda: f"is between {NEW}:4500" in link.a.log(), "the peer knows the new address", SECONDS, 0.2)


def test_we_begin_in_udp_and_rekey() -> None:
    tunnel = replace(DEFAULTS, connection_a={"local_addrs": "%any"})
    with kernel_pair(xfrm, openiked(), tunnel) as both:
        link = both.link
        up(link)
        carries(both)
        assert [child.encap for child in link.children()] == [True, True]
        for what in ({"child": CHILD}, {"ike": CONNECTION}):
            done = link.rekeyed(children="child" in what, timeout=SECONDS)
            link.a.rekey(**what)
            done()
            carries(both)
        # By MOBIKE OpenIKED 7.2 moves the IKE SA and its policies, but has AF_KEY look for its SAs at the new address, where they are not: new ones are needed.
        move(link)
        done = link.rekeyed(timeout=SECONDS)
        link.a.rekey(child=CHILD)
        done()
        carries(both)
        link.a.terminate()
        link.b.wait_gone(timeout=SECONDS)


def test_it_begins_without_udp_and_its_lifetimes_rekey() -> None:
    tunnel = replace(DEFAULTS, connection_options={"encap": "no"})
    with kernel_pair(openiked("ikelifetime 8 lifetime 3h bytes 400K"), OURS, tunnel) as both:
        link = both.link
        up(link)
        carries(both)
        done = link.rekeyed(timeout=SECONDS)
        link.datagrams(count=345, rate=200.0, size=1100)
        done()
        carries(both)
        link.rekeyed(children=False, timeout=SECONDS)()
        carries(both)
        link.a.terminate()
        link.b.wait_gone(timeout=SECONDS)
