"""The MTU of a tunnel's device: what its route leaves when IP, GRE and ESP have taken theirs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.mpls.node import Tunnel

IP_HEADER: Final = {4: 20, 6: 40}  # octets, by IP version
# RFC 4303: SPI and sequence number, the longest IV, padding, its length and the next header, the longest ICV
LONGEST_ESP: Final = 8 + 16 + 15 + 2 + 32
UDP_HEADER: Final = 8  # around ESP, behind a NAT
SMALLEST: Final = 1280  # below, Linux has no IPv6 on a device, and so no route of a VRF for it

# Choices of this implementation
WITHOUT_A_ROUTE: Final = 1500


def device_mtu(tunnel: Tunnel, outer: int) -> int:
    """Octets of a label stack with its packet, where the way to the peer takes packets of `outer` octets.

    The SA is not known yet: of transport mode the one that takes most has room, and so has any AEAD of tunnel mode that is not in UDP.
    """
    return max(outer - IP_HEADER[tunnel.local.version] - tunnel.encapsulation.overhead - LONGEST_ESP - UDP_HEADER, SMALLEST)


async def outer_mtu(route: AsyncIPRoute, tunnel: Tunnel, mtus: Mapping[int, int] | None = None) -> int:
    """Of the route to the peer, what was learnt of its path included, or else of the route's device. `mtus` of devices by index, if they are known."""
    with suppress(NetlinkError):
        for message in await route.route("get", dst=str(tunnel.remote), src=str(tunnel.local)):
            metrics = message.get("RTA_METRICS")
            if metrics is not None and (mtu := metrics.get("RTAX_MTU")):
                return int(mtu)
            index = message.get("RTA_OIF")
            if mtus is not None and index in mtus:
                return mtus[index]
            for link in await route.link("get", index=index):
                return int(link.get("IFLA_MTU"))
    return WITHOUT_A_ROUTE
