"""Two or three provider edges with three customers each, all of them in the same 10.0.0.0/24 and the same IPv6 subnet.

Each site of a customer has a part of it: of two sites site 1 the lower half, site 2 the upper one. Hosts believe that the whole subnet is on their
link, and the PE answers for the other parts (proxy ARP and NDP). A packet that reached another customer's host of the same address would be answered there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from lab.namespaces import Lab, Namespace
from lab.topology import WAN

CUSTOMERS: Final = ("red", "blue", "green")
SUBNET4: Final = IPv4Network("10.0.0.0/24")
ASKED: Final = 1000  # times, one a second, who has an address
SUBNET6: Final = IPv6Network("fd00:c::/64")


@dataclass(frozen=True, slots=True)
class Customer:
    """One customer's site: `host` behind the PE's interface `member`."""

    name: str
    host: Namespace
    host4: IPv4Address
    host6: IPv6Address
    member: str
    net4: IPv4Network
    net6: IPv6Network


@dataclass(frozen=True, slots=True)
class Provider:
    """A PE and the customers' sites behind it."""

    gateway: Namespace
    wan4: IPv4Address
    wan6: IPv6Address
    customers: dict[str, Customer]


@dataclass(frozen=True, slots=True)
class Providers:
    lab: Lab
    edges: tuple[Provider, ...]

    @property
    def a(self) -> Provider:
        return self.edges[0]

    @property
    def b(self) -> Provider:
        return self.edges[1]

    @property
    def c(self) -> Provider:
        return self.edges[2]


def label_connection(name: str, near: object, far: object, protocol: str = "gre", *, child: str = "labels", children: str = "") -> str:
    """A connection from address to address, with an SA on demand for the packets that carry labels, in that protocol. `children`: further ones."""
    return f"""
  {name} {{
    local_addrs = {near}
    remote_addrs = {far}
    proposals = aes128gcm16-prfsha256-x25519
    local {{ auth = psk }}
    remote {{ auth = psk }}
    children {{
      {child} {{
        mode = transport
        local_ts = {near}[{protocol}]
        remote_ts = {far}[{protocol}]
        esp_proposals = aes128gcm16
        start_action = trap
      }}
      {children}
    }}
  }}
"""


def _provider(lab: Lab, letter: str, number: int, halvings: int) -> Provider:
    gateway = lab.namespace(f"pe-{letter}")
    # Strict reverse path checks know nothing of rules by interface.
    gateway.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv4__conf__all__rp_filter=0, ipv4__conf__default__rp_filter=0)
    net4, net6 = list(SUBNET4.subnets(halvings))[number - 1], list(SUBNET6.subnets(halvings))[number - 1]
    customers = {}
    for name in CUSTOMERS:
        host, member = lab.namespace(f"{name}-{letter}"), f"ce-{name}"
        lab.veth(host, "lan", gateway, member)
        # A PE is silent while it has no way: a host that would give up asking loses a packet that it sends just when there is one again.
        host.sysctl(ipv4__neigh__lan__mcast_solicit=ASKED)
        customer = Customer(name, host, net4[10], net6[0x10], member, net4, net6)
        gateway.ip(f"addr add {net4[1]}/{net4.prefixlen} dev {member}", f"addr add {net6[1]}/{net6.prefixlen} dev {member} nodad")
        gateway.sysctl(**{f"ipv4__conf__{member}__proxy_arp": 1, f"ipv4__conf__{member}__send_redirects": 0})
        host.ip(
            f"addr add {customer.host4}/{SUBNET4.prefixlen} dev lan",
            f"addr add {customer.host6}/{net6.prefixlen} dev lan nodad",
            f"route add default via {net6[1]}",
        )
        customers[name] = customer
    return Provider(gateway, IPv4Address(f"192.0.2.{number}"), IPv6Address(f"2001:db8::{number}"), customers)


def _router_between(lab: Lab, edges: tuple[Provider, ...], mtu: int) -> None:
    """It answers for all others on either link (proxy ARP), so that both believe in one subnet."""
    core = lab.namespace("core")
    core.sysctl(ipv4__ip_forward=1)
    core.ip("addr add 192.0.2.254/32 dev lo")
    for number, pe in enumerate(edges):
        # The PE's own end is wide: it has to be told.
        lab.veth(pe.gateway, WAN, core, f"port{number}")
        core.sysctl(**{f"ipv4__conf__port{number}__proxy_arp": 1})
        core.ip(f"route add {pe.wan4}/32 dev port{number} src 192.0.2.254" + (f" mtu lock {mtu}" if number else ""))


@contextmanager
def providers(count: int = 2, narrow: int = 0) -> Iterator[Providers]:
    """The topology, up; what leads from site to site is the test's. Three PEs meet at a bridge. `narrow`: the MTU of a router's link to b."""
    with Lab() as lab:
        edges = tuple(_provider(lab, "abc"[number], number + 1, (count - 1).bit_length()) for number in range(count))
        if narrow:
            _router_between(lab, edges, narrow)
        elif count == 2:
            lab.veth(edges[0].gateway, WAN, edges[1].gateway, WAN)
        else:
            core = lab.namespace("core")
            core.sysctl(ipv6__conf__default__disable_ipv6=1)
            core.ip("link add middle type bridge", "link set middle up")
            for number, pe in enumerate(edges):
                lab.veth(pe.gateway, WAN, core, f"port{number}")
                core.ip(f"link set port{number} master middle")
        for pe in edges:
            pe.gateway.ip(f"addr add {pe.wan4}/24 dev {WAN}", f"addr add {pe.wan6}/64 dev {WAN} nodad")
        yield Providers(lab, edges)
