"""Labels and VRF routes as routes of Linux: of the platform's label table, and of a VRF's table with labels put on.

`vrfs` are those that stand, by their names. Reading gives an entry back as far as Linux tells it: of the TTL only whether it is handed
down, of what comes to light only the VRF.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.channel.linux_mpls.devices import Devices, tunnel_device
from kernel_shim.channel.linux_mpls.messages import AF_INET, AF_INET6, AF_MPLS, RT_TABLE_MAIN, Route, Way, label_destination, read_label
from kernel_shim.channel.linux_mpls.tables import RouteTables
from kernel_shim.model import ROUTE_PROTOCOL, KernelError
from kernel_shim.mpls.labels import LABEL_BITS, LARGEST_TTL
from kernel_shim.mpls.lfib import PLATFORM, NextHop, Nhlfe, Paths, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, Vrf, VrfRoute

RTN_BLACKHOLE: Final = 6
LAST_METRIC: Final = 0xFFFFFFFE  # of the default that ends a VRF's table
SLICE: Final = 256  # routes that are translated at a time, so that a large table does not starve the rest of the loop

Vrfs = Mapping[str, Vrf]
Entry = LabelBinding | VrfRoute


def stays_within(route: VrfRoute) -> bool:
    """A VRF's own prefixes are its members' subnets and the host's routes in its table: nothing is to be put."""
    return all(isinstance(path.next_hop, ToInterface) for path in route.paths)


async def put_routes(tables: RouteTables, entries: Sequence[Entry], vrfs: Vrfs, *, replace: bool) -> list[KernelError | None]:
    """Why each was not put, if it was not. `replace`: those that stand are ours; EEXIST where they are not."""
    routes: dict[int, Route] = {}
    found: list[KernelError | None] = [None] * len(entries)
    for at, entry in enumerate(entries):
        try:
            routes[at] = as_route(entry, vrfs)
        except KernelError as error:
            found[at] = error
    for at, number in zip(routes, await tables.put(list(routes.values()), replace=replace), strict=True):
        if number:
            found[at] = KernelError(number, _refused(entries[at], number))
    return found


def _refused(entry: Entry, number: int) -> str:
    what = f"label {entry.label}" if isinstance(entry, LabelBinding) else f"{entry.prefix} in VRF {entry.vrf}"
    return f"another program's route stands for {what}" if number == errno.EEXIST else f"{what}: {os.strerror(number)}"


async def delete_routes(tables: RouteTables, entries: Sequence[Entry], vrfs: Vrfs) -> None:
    """What went with a device, or by hand, is passed over."""
    await tables.delete([_target(entry, vrfs) for entry in entries if isinstance(entry, LabelBinding) or entry.vrf in vrfs])


async def clear_table(tables: RouteTables, table: int) -> None:
    """What an earlier device of the VRF has left there of ours."""
    for family in (AF_INET, AF_INET6):
        await tables.delete([route for route in await tables.dump(family, table) if route.table == table])


async def end_table(netlink: AsyncIPRoute, table: int, *, ended: bool) -> None:
    """What has no route in the table never falls through to another one."""
    for family, everything in ((AF_INET, "0.0.0.0/0"), (AF_INET6, "::/0")):
        with nullcontext() if ended else suppress(NetlinkError):
            verb = "replace" if ended else "del"
            await netlink.route(verb, family=family, dst=everything, table=table, priority=LAST_METRIC, type=RTN_BLACKHOLE, proto=ROUTE_PROTOCOL)


# Entries to routes


def as_route(entry: Entry, vrfs: Vrfs) -> Route:
    """KernelError for what Linux cannot do."""
    target = _target(entry, vrfs)
    ways = tuple(_way(path, vrfs) for path in entry.paths)
    if isinstance(entry, VrfRoute):
        if len(ways) > 1 and entry.prefix.version == 6:
            raise KernelError(errno.EOPNOTSUPP, f"route to {entry.prefix}: of IPv6 one path here")
        return _with_ways(target, ways)
    if entry.space != PLATFORM:
        raise KernelError(errno.EOPNOTSUPP, "Linux has one label space a platform")
    handed_down = {path.ttl is TtlModel.UNIFORM for path in entry.paths}
    if len(handed_down) != 1:
        raise KernelError(errno.EOPNOTSUPP, "in Linux all paths of a label treat the TTL alike")
    return _with_ways(target, ways, hands_down=handed_down.pop())


def _with_ways(target: Route, ways: tuple[Way, ...], *, hands_down: bool = False) -> Route:
    return Route(target.family, target.destination, target.length, target.table, ways, hands_down, target.protocol)


def _target(entry: Entry, vrfs: Vrfs) -> Route:
    if isinstance(entry, LabelBinding):
        return Route(AF_MPLS, label_destination(entry.label), LABEL_BITS, RT_TABLE_MAIN, (), protocol=ROUTE_PROTOCOL)
    family = AF_INET if entry.prefix.version == 4 else AF_INET6
    return Route(family, entry.prefix.network_address.packed, entry.prefix.prefixlen, _vrf(entry.vrf, vrfs).table, (), protocol=ROUTE_PROTOCOL)


def _way(path: Nhlfe, vrfs: Vrfs) -> Way:
    if path.entropy:
        raise KernelError(errno.EOPNOTSUPP, "Linux has no entropy labels")
    if path.traffic_class is not None:
        raise KernelError(errno.EOPNOTSUPP, "Linux sets the traffic class of labels that it pushes to 0")
    match path.next_hop:
        case ToPeer(peer=peer):
            name = tunnel_device(peer)
        case ToVrf(vrf=vrf) | ToInterface(vrf=vrf):
            name = _vrf(vrf, vrfs).interface
        case _:
            raise KernelError(errno.EOPNOTSUPP, "in Linux no label leads to the one beneath it")
    try:
        device = socket.if_nametoindex(name)
    except OSError:
        raise KernelError(errno.ENODEV, f"there is no interface {name}") from None
    return Way(device, path.labels, 0 if path.ttl is TtlModel.UNIFORM else LARGEST_TTL)


def _vrf(name: str, vrfs: Vrfs) -> Vrf:
    try:
        return vrfs[name]
    except KeyError:
        raise KernelError(errno.ENODEV, f"there is no VRF {name}") from None


# Routes to entries


async def read_routes(tables: RouteTables, devices: Devices, vrfs: Vrfs) -> AsyncIterator[Entry]:
    """Those of ours that lead to peers and into VRFs. Equal paths are one object."""
    hops: dict[str, NextHop] = {tunnel_device(peer): ToPeer(peer) for peer in devices.tunnels}
    hops |= {vrf.interface: ToVrf(vrf.name) for vrf in vrfs.values()}
    by_index = {index: hops[name] for name, index in devices.indexes.items() if name in hops}
    names = {vrf.table: vrf.name for vrf in vrfs.values()}
    for family in (AF_MPLS, AF_INET, AF_INET6):
        seen: dict[tuple[tuple[Way, ...], bool], Paths | None] = {}
        for number, route in enumerate(await tables.dump(family)):
            if number % SLICE == 0:
                await asyncio.sleep(0)
            ways = route.ways, route.hands_down
            if ways not in seen:
                seen[ways] = _paths(route, by_index)
            paths = seen[ways]
            if paths is None:
                continue
            if family == AF_MPLS:
                yield LabelBinding(read_label(route.destination), paths)
            elif (vrf := names.get(route.table)) is not None:
                yield VrfRoute(vrf, (IPv4Network if family == AF_INET else IPv6Network)((route.destination, route.length)), paths)


def _paths(route: Route, hops: Mapping[int, NextHop]) -> Paths | None:
    """None for a route that leads elsewhere."""
    if not route.ways or any(way.device not in hops for way in route.ways):
        return None
    if route.family == AF_MPLS:
        handed_down = TtlModel.UNIFORM if route.hands_down else TtlModel.PIPE
        return tuple(Nhlfe(hops[way.device], way.labels, handed_down) for way in route.ways)
    return tuple(Nhlfe(hops[way.device], way.labels, TtlModel.PIPE if way.ttl else TtlModel.UNIFORM) for way in route.ways)
