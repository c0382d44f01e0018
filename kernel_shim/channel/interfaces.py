"""XFRM interfaces: the links of route-based tunnels (drivers of Linux 4.19 on, net/xfrm/xfrm_interface_core.c).

What is routed into one meets only policies and SAs of its `if_id`, and what such an SA decrypts comes out of it. Links of ours carry an alias by
which a later run finds them; one that somebody else made is used as it is and stays when we go.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.model import IPNetwork, KernelError

ALIAS: Final = "vpnd"  # of every link of ours; `ip link` shows it
ROUTE_PROTOCOL: Final = 178  # RTPROT_ of our routes; unassigned in rtnetlink.h and /etc/iproute2/rt_protos
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
        async with _Netlink(interface.name) as route:
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
        found = await _links(route, interface.name)
        if found:
            index, if_id, ours = found[0]
            if if_id is None or (if_id != interface.if_id and not ours):
                raise KernelError(
                    errno.EEXIST, f"interface {interface.name}: there is a link of this name that is not an XFRM interface of if_id {interface.if_id}"
                )
            if if_id == interface.if_id:
                await route.link("set", index=index, state="up")
                return _Standing(index, ours, frozenset())
            await route.link("del", index=index)  # its number changed
        await route.link("add", ifname=interface.name, kind="xfrm", xfrm_if_id=interface.if_id)
        index, _, _ = (await _links(route, interface.name))[0]
        await route.link("set", index=index, ifalias=ALIAS, state="up")
        return _Standing(index, True, frozenset())

    async def remove(self, name: str) -> None:
        """Its routes go, and the link if we made it. That it is gone already is no error."""
        standing = self._standing.pop(name, None)
        if standing is None:
            return
        async with _Netlink(name) as route:
            for network in standing.routes:
                await _delete_route(route, standing.index, network)
            if standing.ours:
                with suppress(NetlinkError):
                    await route.link("del", index=standing.index)

    async def remove_left_over(self) -> Sequence[str]:
        """Take away what an earlier run made and this one has not put. The names."""
        removed = []
        async with _Netlink("of an earlier run") as route:
            for message in [message async for message in await route.get_links(kind="xfrm")]:
                name = message.get("IFLA_IFNAME")
                if message.get("IFLA_IFALIAS") == ALIAS and name not in self._standing:
                    with suppress(NetlinkError):
                        await route.link("del", index=message["index"])
                        removed.append(name)
        return removed

    async def close(self) -> None:
        """Take all away."""
        for name in self.names:
            with suppress(KernelError):
                await self.remove(name)


class _Netlink:
    """A route socket whose errors are ours."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._route = AsyncIPRoute()

    async def __aenter__(self) -> AsyncIPRoute:
        return await self._route.__aenter__()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._route.__aexit__(None, None, None)
        if isinstance(error, NetlinkError):
            raise KernelError(error.code, f"interface {self._name}: {error}") from error


async def _links(route: AsyncIPRoute, name: str) -> list[tuple[int, int | None, bool]]:
    """Index, if_id (None for a link of another kind) and whether it is ours."""
    found = []
    try:
        for message in await route.link("get", ifname=name):
            information: Any = message.get("IFLA_LINKINFO")
            kind = information.get("IFLA_INFO_KIND") if information else None
            data = information.get("IFLA_INFO_DATA") if kind == "xfrm" else None
            if_id = data.get("IFLA_XFRM_IF_ID") or 0 if data is not None else None
            found.append((message["index"], if_id, message.get("IFLA_IFALIAS") == ALIAS))
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
    return found


async def _delete_route(route: AsyncIPRoute, index: int, network: IPNetwork) -> None:
    with suppress(NetlinkError):  # it went with an address, or by hand
        await route.route("del", dst=str(network), oif=index, proto=ROUTE_PROTOCOL, family=_family(network))


def _family(network: IPNetwork) -> int:
    return 2 if network.version == 4 else 10
