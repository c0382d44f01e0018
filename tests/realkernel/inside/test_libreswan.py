"""Libreswan, with all defaults on both sides: a tunnel that carries, and goes on carrying when either side rekeys, or changes its address."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.gateway import Gateway
from lab.libreswan import Libreswan
from lab.namespaces import Namespace
from lab.pairing import OURS
from lab.process import wait_until
from lab.tunnel import CHILD, CONNECTION, Side, Tunnel
from realkernel.kernel_gateways import KernelPair, kernel_pair, xfrm

pytestmark = [pytest.mark.realkernel, pytest.mark.timeout(600)]  # its start and each order to it takes seconds under emulation

SECONDS = 60.0  # for what takes less than one on a machine that is not emulated


def carries(both: KernelPair) -> None:
    for side in Side:
        assert both.link.ping(side).lost == 0


def rekeyed(ours: Gateway, theirs: Libreswan, by: Gateway | Libreswan) -> None:
    """A CHILD_SA and an IKE SA that are new, and no others, at both sides."""

    def alone() -> tuple[str, int] | None:
        sas = ours.ike_sas()
        one = len(sas) == 1 and [child.state for child in sas[0].children] == ["INSTALLED"]
        return (sas[0].initiator_spi, sas[0].children[0].spi_in) if one else None

    before = wait_until(alone, "one of each", SECONDS, 0.2)
    by.rekey(child=CHILD)
    wait_until(lambda: (now := alone()) and now[1] != before[1], "the CHILD_SA is rekeyed", SECONDS, 0.2)
    by.rekey(ike=CONNECTION)
    wait_until(lambda: (now := alone()) and now[0] != before[0], "the IKE SA is rekeyed", SECONDS, 0.2)
    (child,) = ours.children()
    wait_until(lambda: [(other.spi_out, other.spi_in) for other in theirs.children()] == [(child.spi_in, child.spi_out)], "both know the same", SECONDS, 0.5)


def test_either_side_begins_and_rekeys() -> None:
    tunnel = Tunnel(proposals="default", esp_proposals="default")
    with kernel_pair(OURS, Libreswan, tunnel) as both:
        ours, theirs = both.link.a, both.link.b
        assert isinstance(ours, Gateway)
        assert isinstance(theirs, Libreswan)
        ours.initiate(timeout=SECONDS)
        carries(both)
        for by in (ours, theirs):
            rekeyed(ours, theirs, by)
            carries(both)
        theirs.terminate()
        ours.wait_gone(timeout=SECONDS)
        theirs.initiate()
        ours.wait_child(timeout=SECONDS)
        carries(both)
        (child,) = theirs.children()
        assert min(child.bytes_in, child.bytes_out) > 0
        assert both.leaks() == []


NEW = "192.0.2.77"


def moving(namespace: Namespace, config: Path) -> Libreswan:
    namespace.ip("route add default via 192.0.2.2")  # its way to the peer tells it its address
    return Libreswan(namespace, config, {"mobike": "yes"})


def staying(namespace: Namespace, config: Path) -> Libreswan:
    return Libreswan(namespace, config, {"mobike": "yes", "right": "%any"})  # without, it agrees to no MOBIKE


def outer_addresses(gateway: Namespace) -> list[str]:
    return sorted(line for line in gateway.run(["ip", "xfrm", "state"]).stdout.splitlines() if line.startswith("src"))


@pytest.mark.parametrize("ours", [Side.A, Side.B])
def test_an_address_changes(ours: Side) -> None:
    tunnel = Tunnel(proposals="default", esp_proposals="default", connection_options={"mobike": "yes", "encap": "no"}, connection_a={"local_addrs": "%any"})
    with kernel_pair(*((xfrm, staying) if ours is Side.A else (moving, xfrm)), tunnel) as both:
        link = both.link
        a, b = link.sites.a, link.sites.b
        link.a.initiate(timeout=SECONDS)
        link.b.wait_child(timeout=SECONDS)
        carries(both)
        before = [(child.spi_in, child.spi_out) for child in link.children()]
        a.gateway.sysctl(ipv4__conf__wan__promote_secondaries=1)  # else the new address goes with the old one
        a.gateway.ip(f"addr add {NEW}/24 dev wan", f"addr del {a.wan4}/24 dev wan", f"route replace {b.net4} via {b.wan4}")
        b.gateway.ip(f"route replace {a.net4} via {NEW}")
        link.carries_again(timeout=SECONDS)
        # Linux finds an inbound SA by its SPI and destination: traffic passes before it is told the source, too, for which it is put anew.
        moved = [f"src {b.wan4} dst {NEW}", f"src {NEW} dst {b.wan4}"]
        wait_until(lambda: all(outer_addresses(site.gateway) == moved for site in (a, b)), "all SAs have moved", SECONDS, 0.2)
        carries(both)
        assert [(child.spi_in, child.spi_out) for child in link.children()] == before
        assert both.leaks() == []
