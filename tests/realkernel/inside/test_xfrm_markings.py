"""Marks and interface ids that are given to each CHILD_SA (`%unique`), in the real kernel, on our side and on strongSwan's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytest
from lab.daemon import Daemon
from lab.topology import LAN
from lab.tunnel import Side, Tunnel
from realkernel.kernel_gateways import XfrmGateway, kernel_pair, strongswan, xfrm

pytestmark = pytest.mark.realkernel

PLAIN: Final = {"encap": "no"}
LINK: Final = "ipsec0"


def listed(daemon: Daemon) -> Mapping[str, Any]:
    """The one CHILD_SA that is not going, as list-sas has it."""
    (child,) = (child for entry in daemon.request("list-sas") for ike in entry.values() for child in ike["child-sas"].values() if child["state"] == "INSTALLED")
    found: Mapping[str, Any] = child
    return found


def test_a_tunnel_by_the_mark_that_it_was_given() -> None:
    """What hosts send is marked with the number that list-sas tells, and a rekeying changes nothing."""
    marked = {"mark_in": "%unique", "mark_out": "%unique", "set_mark_in": "%same"}
    with kernel_pair(xfrm, strongswan, Tunnel(connection_options=PLAIN, child_options=marked)) as both:
        link = both.link
        assert isinstance(link.a, XfrmGateway)
        link.a.initiate()
        for site, daemon in ((link.sites.a, link.a), (link.sites.b, link.b)):
            child = listed(daemon)
            assert child["mark-in"] == child["mark-out"]
            rule = f"iifname {LAN} meta mark set {int(child['mark-out'], 16)}"
            chain = "add table ip own; add chain ip own in { type filter hook prerouting priority mangle; }"
            site.gateway.run(["nft", f"{chain}; add rule ip own in {rule}"])
        both.carries()
        mark = listed(link.a)["mark-out"]
        assert f"mark {int(mark, 16):#x}/0xffffffff" in link.a.kernel("policy")
        rekeyed = link.rekeyed()
        link.a.rekey(child="net")
        rekeyed()
        assert listed(link.a)["mark-out"] == mark
        assert link.ping(Side.A).lost == 0
        link.a.stop()
        assert link.a.traces() == ["table ip own"]


def test_a_tunnel_by_the_interface_that_its_ike_sa_was_given() -> None:
    """Selectors of everything; who is told of the number makes the interface, and a rekeying of the IKE SA changes nothing."""
    everything = Tunnel(ts_a="0.0.0.0/0", ts_b="0.0.0.0/0", connection_options={**PLAIN, "if_id_in": "%unique", "if_id_out": "%unique"})
    with kernel_pair(xfrm, strongswan, everything) as both:
        link = both.link
        link.b.initiate()
        for near, far, daemon in ((link.sites.a, link.sites.b, link.a), (link.sites.b, link.sites.a, link.b)):
            number = int(listed(daemon)["if-id-out"], 16)
            near.gateway.ip(f"link add {LINK} type xfrm if_id {number}", f"link set {LINK} up", f"route replace {far.net4} dev {LINK}")
        both.carries()
        number = listed(link.a)["if-id-in"]
        rekeyed = link.rekeyed(children=False)
        link.a.rekey(ike="site")
        rekeyed()
        rekeyed = link.rekeyed()
        link.a.rekey(child="net")
        rekeyed()
        assert listed(link.a)["if-id-in"] == listed(link.a)["if-id-out"] == number
        assert link.ping(Side.B).lost == 0
