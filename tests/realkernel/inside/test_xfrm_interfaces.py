"""Route-based tunnels: what is routed into an XFRM interface meets its policies and SAs, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import pytest
from lab.daemon import Daemon
from lab.namespaces import Namespace
from lab.pairing import DaemonFactory
from lab.tunnel import Side, Tunnel
from realkernel.kernel_gateways import XfrmGateway, kernel_pair, strongswan, xfrm

pytestmark = pytest.mark.realkernel

LINK: Final = "ipsec0"
OWN: Final = {"if_id_in": "42", "if_id_out": "42", "xfrm_interface": LINK}
PLAIN: Final = {"encap": "no"}


def counted(namespace: Namespace) -> tuple[int, int]:
    """Packets that the interface sent and received."""
    (link,) = json.loads(namespace.run(["ip", "-s", "-json", "link", "show", "dev", LINK]).stdout)
    return link["stats64"]["tx"]["packets"], link["stats64"]["rx"]["packets"]


def routes(daemon: Daemon) -> list[str]:
    return [line.split()[0] for line in daemon.namespace.run(["ip", "route", "show", "dev", LINK]).stdout.splitlines()]


@pytest.mark.parametrize(("peer", "options"), [pytest.param(xfrm, OWN, id="both-by-route"), pytest.param(strongswan, {}, id="strongswan-by-policy")])
def test_an_interface_of_ours_carries_its_tunnel(peer: DaemonFactory, options: Mapping[str, str]) -> None:
    with kernel_pair(xfrm, peer, Tunnel(connection_options=PLAIN, options_a=OWN, options_b=options)) as both:
        a = both.link.a
        assert isinstance(a, XfrmGateway)
        assert routes(a) == [str(both.link.sites.b.net4)]
        a.initiate()
        both.carries()
        sent, received = counted(a.namespace)
        child = a.child()
        assert sent >= 100
        assert received >= 100
        assert child.packets_out >= sent
        assert "if_id 0x2a" in a.kernel("state")
        a.kill_vpnd()
        assert both.link.ping(Side.A).lost == 0
        a.start_vpnd()
        assert routes(a) == [str(both.link.sites.b.net4)]
        a.stop()
        assert a.traces() == []


def test_everything_may_be_routed_by_hand_into_an_interface_that_stays() -> None:
    """Selectors of everything, and the operator's own interface and routes: what is not routed into it leaves as ever."""
    everything = Tunnel(ts_a="0.0.0.0/0", ts_b="0.0.0.0/0", connection_options=PLAIN, options_a=OWN, options_b=OWN)

    def prepared(namespace: Namespace) -> None:
        namespace.ip(f"link add {LINK} type xfrm if_id 42", f"link set {LINK} up")

    def make(namespace: Namespace, config: object) -> Daemon:
        prepared(namespace)
        return xfrm(namespace, config)  # type: ignore[arg-type]

    with kernel_pair(make, make, everything) as both:
        sites = both.link.sites
        for near, far in ((sites.a, sites.b), (sites.b, sites.a)):
            assert near.gateway.run(["ip", "route", "show", "dev", LINK]).stdout == ""
            near.gateway.ip(f"route replace {far.net4} dev {LINK}")
        both.link.a.initiate()
        both.carries()
        assert counted(sites.a.gateway)[0] >= 100
        before = both.children()[0].packets_out
        assert sites.a.gateway.run(["ping", "-c", "1", "-W", "5", str(sites.b.wan4)]).returncode == 0
        assert both.children()[0].packets_out == before
        both.link.a.stop()
        assert LINK in sites.a.gateway.interfaces()
