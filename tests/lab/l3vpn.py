"""PEs whose customers' routes two FRRs exchange (RFC 4364, RFC 4659): the BGP session goes through a tunnel, and so do the packets under the labels it tells.

Red and blue have the same addresses and different route targets. Each has a VRF device, in which FRR knows its site as a connected subnet. A VPN route
wants a way to its next hop that carries labels: a GRE device, and a route map that says so. Should a packet take it, the same SA protects it. The sessions
are one for each family: over IPv4 bgpd tells IPv6 routes with a next hop that zebra 8.4 does not resolve.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernel_shim.channel.linux_mpls.devices import tunnel_device
from lab.frr import Frr
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.provider_edges import MakeGateway
from lab.providers import Provider, label_connection

CUSTOMERS: Final = {"red": 1, "blue": 2}
THROUGH: Final = "through"  # the GRE device

ROUTING: Final = """
      routing {{
        local_ts = 10.255.0.{own}/32, fd00:ff::{own}/128
        remote_ts = 10.255.0.{other}/32, fd00:ff::{other}/128
        esp_proposals = aes128gcm16
        start_action = trap
      }}
"""
CONFIGURATION: Final = """
connections {{ {connection} }}
secrets {{ ike-pe {{ secret = "two customers and a route reflector" }} }}
mpls {{
  {fpm}
  vrfs {{ {vrfs} }}
  peers {{ pe {{ local = {near}
    remote = {far}
    accept = 1000-1999
    next_hops = 10.255.0.{other}, fd00:ff::{other} }} }}
}}
"""
BGP: Final = """
route-map through-gre permit 10
 set l3vpn next-hop encapsulation gre
router bgp 65000
 bgp router-id 10.255.0.{own}
 no bgp default ipv4-unicast
 no bgp suppress-duplicates
 bgp graceful-restart
 bgp graceful-restart preserve-fw-state
 timers bgp 20 60
 neighbor 10.255.0.{other} remote-as 65000
 neighbor 10.255.0.{other} update-source 10.255.0.{own}
 neighbor 10.255.0.{other} timers connect 2
 neighbor fd00:ff::{other} remote-as 65000
 neighbor fd00:ff::{other} update-source fd00:ff::{own}
 neighbor fd00:ff::{other} timers connect 2
 address-family ipv4 vpn
  neighbor 10.255.0.{other} activate
  neighbor 10.255.0.{other} route-map through-gre in
 address-family ipv6 vpn
  neighbor fd00:ff::{other} activate
  neighbor fd00:ff::{other} route-map through-gre in
"""
BGP_VRF: Final = """
router bgp 65000 vrf {vrf}
 bgp router-id 10.255.0.{own}
 address-family ipv4 unicast
  redistribute connected
  label vpn export 1{own}{vpn}4
  rd vpn export 65000:{own}{vpn}
  rt vpn both 65000:{vpn}
  export vpn
  import vpn
 address-family ipv6 unicast
  redistribute connected
  label vpn export 1{own}{vpn}6
  rd vpn export 65000:{own}{vpn}
  rt vpn both 65000:{vpn}
  export vpn
  import vpn
"""


def daemons(number: int, way: str, *, fpm: bool) -> dict[str, str]:
    """FRR's configuration of PE 1 or 2; the device `way` leads to the other."""
    own, other = number, 3 - number
    return {
        "zebra": "fpm address 127.0.0.1 port 2620\n" if fpm else "",
        "staticd": f"ip route 10.255.0.{other}/32 {way}\nipv6 route fd00:ff::{other}/128 {way}\n",
        "bgpd": BGP.format(own=own, other=other) + "".join(BGP_VRF.format(vrf=name, vpn=vpn, own=own) for name, vpn in CUSTOMERS.items()),
    }


def configuration(number: int, near: Provider, far: Provider, *, fpm: bool) -> str:
    """Linux' own forwarding has VRF devices of ours, named as FRR names the VRFs; ours has TUNs of the usual names, beside VRF devices of the host's own."""
    interface = "" if fpm else "interface = {}\n"
    vrfs = "".join(f"{name} {{ {interface.format(name)} table = {100 + vpn}\n members = ce-{name} }}\n" for name, vpn in CUSTOMERS.items())
    feed = "fpm = yes\n fpm_settle = 100\n fpm_grace = 300" if fpm else ""
    connection = label_connection("pe", near.wan4, far.wan4, children=ROUTING.format(own=number, other=3 - number))
    return CONFIGURATION.format(connection=connection, near=near.wan4, far=far.wan4, other=3 - number, fpm=feed, vrfs=vrfs)


def make_devices(node: Namespace, near: Provider, far: Provider) -> None:
    """FRR's view: VRF devices with tables of their own, and the way of labels. Linux takes zebra's routes there, and no packet does."""
    node.ip(f"link add {THROUGH} type gre local {near.wan4} remote {far.wan4} ttl 64", f"link set {THROUGH} up")
    for name, vpn in CUSTOMERS.items():
        customer = near.customers[name]
        member, net6 = customer.member, customer.net6
        node.ip(f"link add {name} type vrf table {1000 + vpn}", f"link set {name} up", f"link set {member} master {name}")
        node.ip(f"addr replace {net6[1]}/{net6.prefixlen} dev {member} nodad")  # entering took it
    node.sysctl(mpls__platform_labels=100_000)


@dataclass
class Edge:
    """A PE with its routing daemon."""

    near: Provider
    gateway: Gateway
    frr: Frr

    def start(self) -> None:
        """The gateway first: VRF devices may be its own."""
        self.gateway.start()
        self.frr.start()

    def bgp(self, *lines: str) -> None:
        self.frr.tell(*lines, daemon="bgpd")

    def tell_of(self, customer: str, family: str, *, told: bool) -> None:
        """Whether the other PE hears of this customer's site."""
        self.bgp(f"router bgp 65000 vrf {customer}", f"address-family {family} unicast", "export vpn" if told else "no export vpn")

    def relabel(self, customer: str, family: str, label: int) -> None:
        """Under which label this customer's site is to be reached from now on."""
        self.bgp(f"router bgp 65000 vrf {customer}", f"address-family {family} unicast", f"label vpn export {label}")

    def kill(self) -> None:
        self.frr.kill()
        self.gateway.kill()

    def account(self) -> str:
        """What there is to look at when routes do not come."""
        run, told = self.gateway.namespace.run, [self.gateway.log()[-4000:], self.frr.log()]
        for daemon, commands in {
            "bgpd": ("show bgp summary", "show bgp ipv4 vpn", "show bgp ipv6 vpn", "show bgp vrf red ipv4 unicast", "show bgp nexthop"),
            "zebra": ("show ip route", "show ip route vrf red", "show ipv6 route vrf red", "show mpls table", "show zebra dplane providers"),
        }.items():
            for command in commands:
                try:
                    told += [f"--- {command}", self.frr.ask(command, daemon=daemon)]
                except Exception as error:  # whatever it is, the rest is of interest
                    told.append(str(error))
        for command in ("-br link", "rule", "-6 rule", "route show table all", "-6 route show table all", "-f mpls route", "xfrm policy"):
            told += [f"--- ip {command}", run(["ip", *command.split()], check=False).stdout]
        return "\n".join(told)


def routed_edge(number: int, near: Provider, far: Provider, directory: Path, linux: MakeGateway | None = None) -> Edge:
    """PE 1 or 2, not started. On the userspace kernel, labels and routes come from zebra's FPM; `linux` makes one whose zebra programs the kernel."""
    node = near.gateway
    node.ip(f"addr add 10.255.0.{number}/32 dev lo", f"addr add fd00:ff::{number}/128 dev lo nodad")
    if linux is None:
        make_devices(node, near, far)
    directory.mkdir()
    gateway = (linux or Gateway)(node, directory / "gateway.conf")
    gateway.config.write_text(configuration(number, near, far, fpm=linux is None))
    way = THROUGH if linux is None else tunnel_device("pe")
    return Edge(near, gateway, Frr(node, directory / "frr", daemons(number, way, fpm=linux is None)))
