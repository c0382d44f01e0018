"""XFRM interfaces: the links of route-based tunnels (drivers of Linux 4.19 on, net/xfrm/xfrm_interface_core.c).

What is routed into one meets only policies and SAs of its `if_id`, and what such an SA decrypts comes out of it. Links of ours carry an alias by
which a later run finds them; one that somebody else made is used as it is and stays when we go.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.channel.route_socket import ALIAS, RouteSocket, alias, data, kind, link_named, make_link
from kernel_shim.model import ROUTE_PROTOCOL, IPNetwork, KernelError

MAX_INTERFACES: Final = 16_384


@dataclass(frozen=True, slots=True)
class XfrmInterface:
    """`routes` lead into it, in the main table."""

    name: str
    if_id: int
    routes: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class _Standing:
    index: int
    ours: bool
    routes: frozenset[IPNetwork]


class XfrmInterfaces:
    """Those of this run, in the network namespace of the calling thread. Errors are KernelError, and name the interface."""

    def __init__(self) -> None:
        self._standing: dict[str, _Standing] = {}

    @property
    def names(self) -> Sequence[str]:
        return list(self._standing)

    async def put(self, interface: XfrmInterface) -> None:
        """Make it, or take over what is there under this name, up and with these routes. EEXIST for a link of another kind or if_id."""
        if interface.name not in self._standing and len(self._standing) >= MAX_INTERFACES:
            raise KernelError(errno.ENOSPC, f"more than {MAX_INTERFACES} interfaces")
        async with RouteSocket(f"interface {interface.name}") as route:
            standing = await self._link(route, interface)
            wanted = frozenset(interface.routes)
            known = self._standing.get(interface.name)
            had = known.routes if known is not None and known.index == standing.index else frozenset()
            for network in wanted:
                await route.route("replace", dst=str(network), oif=standing.index, proto=ROUTE_PROTOCOL, family=_family(network))
            for network in had - wanted:
                await _delete_route(route, standing.index, network)
            self._standing[interface.name] = _Standing(standing.index, standing.ours, wanted)

    async def _link(self, route: AsyncIPRoute, interface: XfrmInterface) -> _Standing:
        link = await link_named(route, interface.name)
        if link is not None:
            ours = alias(link) == ALIAS
            same = kind(link) == "xfrm" and (data(link, "IFLA_XFRM_IF_ID") or 0) == interface.if_id
            if same:
                await route.link("set", index=link["index"], state="up")
                return _Standing(link["index"], ours, frozenset())
            if kind(link) != "xfrm" or not ours:
                raise KernelError(
                    errno.EEXIST, f"interface {interface.name}: there is a link of this name that is not an XFRM interface of if_id {interface.if_id}"
                )
            await route.link("del", index=link["index"])  # its number changed
        index = (await make_link(route, ifname=interface.name, kind="xfrm", xfrm_if_id=interface.if_id))["index"]
        await route.link("set", index=index, ifalias=ALIAS, state="up")
        return _Standing(index, True, frozenset())

    async def remove(self, name: str) -> None:
        """Its routes go, and the link if we made it. That it is gone already is no error."""
        standing = self._standing.pop(name, None)
        if standing is None:
            return
        async with RouteSocket(f"interface {name}") as route:
            for network in standing.routes:
                await _delete_route(route, standing.index, network)
            if standing.ours:
                with suppress(NetlinkError):
                    await route.link("del", index=standing.index)

    async def remove_left_over(self) -> Sequence[str]:
        """Take away what an earlier run made and this one has not put. The names."""
        removed = []
        async with RouteSocket("interfaces of an earlier run") as route:
            for message in [message async for message in await route.get_links(kind="xfrm")]:
                name = message.get("IFLA_IFNAME")
                if alias(message) == ALIAS and name not in self._standing:
                    with suppress(NetlinkError):
                        await route.link("del", index=message["index"])
                        removed.append(name)
        return removed

    async def close(self) -> None:
        """Take all away."""
        for name in self.names:
            with suppress(KernelError):
                await self.remove(name)


async def _delete_route(route: AsyncIPRoute, index: int, network: IPNetwork) -> None:
    with suppress(NetlinkError):  # it went with an address, or by hand
        await route.route("del", dst=str(network), oif=index, proto=ROUTE_PROTOCOL, family=_family(network))


def _family(network: IPNetwork) -> int:
    return 2 if network.version == 4 else 10
