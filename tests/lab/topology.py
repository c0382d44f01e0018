"""Two sites: host A - gateway A - wire or relay - gateway B - host B, IPv4 and IPv6.

The gateways route to each other's site over the wire, so a packet that no policy catches arrives, in clear: a test that
only pings proves nothing, and a capture on the wire shows every leak.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from lab.namespaces import Lab, Namespace, stopping
from lab.relay import Relay, RelaySettings

WAN: Final = "wan"
LAN: Final = "lan"
OFFLOADS: Final = ("tso", "gso", "tx_udp_segmentation")


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway and the host behind it. `wan4`, `wan6` are the gateway's addresses on the wire."""

    gateway: Namespace
    host: Namespace
    wan4: IPv4Address
    wan6: IPv6Address
    net4: IPv4Network
    net6: IPv6Network

    @property
    def host4(self) -> IPv4Address:
        return self.net4[10]

    @property
    def host6(self) -> IPv6Address:
        return self.net6[0x10]


@dataclass(frozen=True, slots=True)
class Sites:
    lab: Lab
    a: Site
    b: Site
    relay: Relay | None

    @property
    def inner_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return (self.a.net4, self.a.net6, self.b.net4, self.b.net6)


def _site(lab: Lab, letter: str, number: int) -> Site:
    site = Site(
        gateway=lab.namespace(f"gw-{letter}"),
        host=lab.namespace(f"host-{letter}"),
        wan4=IPv4Address(f"192.0.2.{number}"),
        wan6=IPv6Address(f"2001:db8::{number}"),
        net4=IPv4Network(f"10.{number}.0.0/16"),
        net6=IPv6Network(f"fd00:{number}::/64"),
    )
    lab.veth(site.host, LAN, site.gateway, LAN)
    site.gateway.sysctl(
        ipv4__ip_forward=1,
        ipv6__conf__all__forwarding=1,
        ipv4__conf__all__send_redirects=0,
        ipv4__conf__lan__send_redirects=0,
    )
    site.gateway.ip(f"addr add {site.net4[1]}/16 dev {LAN}", f"addr add {site.net6[1]}/64 dev {LAN} nodad")
    site.host.ip(
        f"addr add {site.host4}/16 dev {LAN}",
        f"addr add {site.host6}/64 dev {LAN} nodad",
        f"route add default via {site.net4[1]}",
        f"route add default via {site.net6[1]}",
    )
    return site


def _know_each_other(a: Site, b: Site) -> None:
    """Permanent neighbour entries: a first packet's way must not include address resolution over a slow relay."""
    hardware = {site.wan4: site.gateway.hardware_address(WAN) for site in (a, b)}
    for near, far in ((a, b), (b, a)):
        near.gateway.ip(*(f"neigh replace {address} lladdr {hardware[far.wan4]} dev {WAN} nud permanent" for address in (far.wan4, far.wan6)))


@contextmanager
def sites(*, relay: RelaySettings | None = None, offloads: bool = True, mtu: int = 1500) -> Iterator[Sites]:
    """The topology, up and routed.

    `relay`: frames between the gateways pass a process that delays, drops, reorders and doubles them; else a plain wire.
    `offloads=False`: the gateways' outer links send no packet above the MTU, as most real network cards behind no large-send offload.
    """
    with Lab() as lab:
        a, b = _site(lab, "a", 1), _site(lab, "b", 2)
        process: Relay | None = None
        if relay is None:
            lab.veth(a.gateway, WAN, b.gateway, WAN, mtu=mtu)
        else:
            wire = lab.namespace("wire")
            wire.sysctl(ipv6__conf__default__disable_ipv6=1)
            lab.veth(a.gateway, WAN, wire, "wire-a", mtu=mtu)
            lab.veth(b.gateway, WAN, wire, "wire-b", mtu=mtu)
            process = Relay(wire, "wire-a", "wire-b", relay)
            lab.enter(stopping(process.process))
            process.wait_ready()
        for near, far in ((a, b), (b, a)):
            near.gateway.ip(
                f"addr add {near.wan4}/24 dev {WAN}",
                f"addr add {near.wan6}/64 dev {WAN} nodad",
                f"route add {far.net4} via {far.wan4}",
                f"route add {far.net6} via {far.wan6}",
            )
            # A relay treats frames one by one: large sends would hide what loss and reordering do to packets.
            if not offloads or relay is not None:
                near.gateway.offloads(WAN, **dict.fromkeys(OFFLOADS, False))
                near.gateway.offloads(WAN, gro=True)
        _know_each_other(a, b)
        yield Sites(lab, a, b, process)
