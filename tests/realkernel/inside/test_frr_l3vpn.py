"""Two FRRs exchange VPNv4 and VPNv6 routes through the tunnel and program Linux' MPLS; ours are the VRF devices, the tunnel, its SA and its gate.

A VPN route needs a labelled way to its next hop. One side has a static route with an implicit null, the other a route map that says GRE.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from lab.capture import Capture
from lab.frr import Frr, missing
from lab.process import wait_until
from lab.provider_edges import CONFIGURATION
from lab.providers import Provider, providers
from lab.topology import WAN
from lab.traffic import ping
from realkernel.kernel_gateways import XfrmGateway

from kernel_shim.channel.linux_labels import tunnel_device

pytestmark = [pytest.mark.realkernel, pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")]

TUNNEL = tunnel_device("pe")
BGP = """
router bgp 65000
 bgp router-id 10.255.0.{own}
 no bgp default ipv4-unicast
 neighbor 10.255.0.{other} remote-as 65000
 neighbor 10.255.0.{other} update-source 10.255.0.{own}
 neighbor 10.255.0.{other} timers connect 2
 address-family ipv4 vpn
  neighbor 10.255.0.{other} activate
  {policy}
 exit-address-family
 address-family ipv6 vpn
  neighbor 10.255.0.{other} activate
  {policy}
 exit-address-family
router bgp 65000 vrf red
 address-family ipv4 unicast
  redistribute connected
  label vpn export 10{own}4
  rd vpn export 65000:{own}
  rt vpn both 65000:1
  export vpn
  import vpn
 exit-address-family
 address-family ipv6 unicast
  redistribute connected
  label vpn export 10{own}6
  rd vpn export 65000:{own}
  rt vpn both 65000:1
  export vpn
  import vpn
 exit-address-family
route-map through-gre permit 10
 set l3vpn next-hop encapsulation gre
"""


def daemons(own: int, other: int) -> dict[str, str]:
    labelled = own == 1
    policy = "" if labelled else f"neighbor 10.255.0.{other} route-map through-gre in"
    return {
        "zebra": "",
        "staticd": f"ip route 10.255.0.{other}/32 {TUNNEL}{' label implicit-null' if labelled else ''}\n",
        "bgpd": BGP.format(own=own, other=other, policy=policy),
    }


def configuration(near: Provider, far: Provider) -> str:
    text = CONFIGURATION.format(near=near.wan4, far=far.wan4, vrfs="red { interface = red\n table = 101\n members = ce-red }", remote_vrfs="")
    return text.replace("vrfs {  }", "accept = 1000-1999")


def test_linux_follows_both_frrs(tmp_path: Path) -> None:
    with providers() as lab, contextlib.ExitStack() as stack:
        wire = stack.enter_context(Capture(lab.a.gateway, WAN))
        frrs = []
        for number, near, far in ((1, lab.a, lab.b), (2, lab.b, lab.a)):
            (tmp_path / str(number)).mkdir()
            near.gateway.ip(f"addr add 10.255.0.{number}/32 dev lo")
            gateway = XfrmGateway(near.gateway, tmp_path / str(number) / "gateway.conf")
            gateway.config.write_text(configuration(near, far))
            stack.callback(gateway.kill)
            gateway.start()
            frrs.append(Frr(near.gateway, tmp_path / f"frr-{number}", daemons(number, 3 - number)))
            stack.callback(frrs[-1].kill)
            frrs[-1].start()
        near, far = lab.a.customers["red"], lab.b.customers["red"]
        try:
            for target in (far.host4, far.host6):
                wait_until(lambda target=target: ping(near.host, target, count=1, timeout=2.0).received, f"{target} answers", 100.0, 1.0)
        except Exception:
            for frr in frrs:
                for command in ("show bgp ipv4 vpn", "show bgp vrf red ipv4 unicast", "show bgp nexthop", "show bgp summary"):
                    print(command, frr.ask(command, daemon="bgpd"))
                for command in ("show ip route vrf red", "show ip route", "show mpls table"):
                    print(command, frr.ask(command))
                print(frr.log(), frr.namespace.run(["ip", "route", "show", "table", "101"]).stdout, frr.namespace.run(["ip", "-f", "mpls", "route"]).stdout)
            raise
        assert "encap mpls" in lab.a.gateway.run(["ip", "route", "show", "table", "101"]).stdout
        assert len(wire.esp()) > 4
        assert wire.clear_packets((near.net4, near.net6, far.net4, far.net6)) == []
        # Withdrawn: no way, and none around the tunnel.
        frrs[1].tell("router bgp 65000 vrf red", "address-family ipv4 unicast", "no export vpn", daemon="bgpd")
        wait_until(lambda: not ping(near.host, far.host4, count=1, timeout=1.0).received, "the withdrawal is followed", 60.0, 0.5)
        assert ping(near.host, far.host6, count=1, timeout=10.0).received
