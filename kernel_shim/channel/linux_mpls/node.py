"""The label node of a Linux kernel, in the network namespace of the calling thread.

| entry | in Linux |
|---|---|
| VRF | a VRF device of its interface's name on its table, its members enslaved, a `blackhole` default that ends the table |
| tunnel | a GRE device, or an `ipip` one that carries MPLS |
| peer | a filter at the device's ingress that passes the labels which the peer may send; behind it `net.mpls.conf.DEVICE.input` |
| label | a route of the platform's label table |
| route | a route of the VRF's table that encapsulates in labels |

What Linux cannot do is refused. The kernel's tables are read, an earlier run's entries in them like ours: links bear an alias and routes a protocol
number of ours. What was put is remembered for what Linux does not tell, and told as it was put while the kernel's entry says as much.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from pyroute2 import AsyncIPRoute

from kernel_shim.channel.linux_mpls import devices, ingress, routes
from kernel_shim.channel.linux_mpls.devices import Devices, tunnel_device
from kernel_shim.channel.route_socket import RouteSocket
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import KernelError
from kernel_shim.mpls.labels import LAST_LABEL
from kernel_shim.mpls.lfib import Key, Nhlfe, Peer, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute

TABLE_SIZE: Final = LAST_LABEL  # as many labels as the kernel takes: it does without the last one


def available() -> bool:
    """Whether the kernel has MPLS (module mpls_router)."""
    return Path("/proc/sys/net/mpls").is_dir()


class LinuxLabels:
    """Implements the part `LabelChannel` of a channel. Errors are KernelError."""

    def __init__(self, sysctls: Sysctls) -> None:
        self._sysctls = sysctls
        self._entries: dict[Key, NodeEntry] = {}  # as they were put, or else read

    async def put_labels(self, entries: Sequence[NodeEntry]) -> None:
        if any(isinstance(entry, LabelBinding | VrfRoute) for entry in entries):
            self._sysctls.set("mpls/platform_labels", str(TABLE_SIZE))
        async with RouteSocket("labels") as netlink:
            for entry in entries:
                upon = [other for other in self._entries.values() if _rests_upon(other, entry)] if isinstance(entry, Tunnel | Vrf) else []
                known = self._entries.get(entry.key)
                if isinstance(known, Vrf) and isinstance(entry, Vrf) and (known.interface, known.table) != (entry.interface, entry.table):
                    for other in (*upon, known):  # in the former table they would stay
                        await self._delete(netlink, other)
                made = await self._put(netlink, entry, ours=known is not None)
                self._entries[entry.key] = entry
                if made:  # what rested upon the former device went with it, or lost a path
                    for other in upon:
                        del self._entries[other.key]
                    for other in upon:
                        await self._put(netlink, other, ours=True)
                        self._entries[other.key] = other

    async def delete_labels(self, entries: Sequence[NodeEntry]) -> None:
        async with RouteSocket("labels") as netlink:
            for entry in entries:
                known = self._entries.get(entry.key)
                if known is not None:
                    await self._delete(netlink, known)
                    del self._entries[entry.key]

    async def labels(self) -> Sequence[NodeEntry]:
        async with RouteSocket("labels") as netlink:
            links = await Devices.read(netlink)
            standing = self._standing_vrfs(links)
            found: list[NodeEntry] = [*standing.values(), *links.tunnels.values()]
            for name in links.tunnels:
                peer = await ingress.admitted(netlink, name, links.indexes[tunnel_device(name)])
                found += [peer] if peer is not None else []
            found += await routes.read_routes(netlink, links, standing)
        read = {entry.key: entry for entry in found}
        within = {key: entry for key, entry in self._entries.items() if isinstance(entry, VrfRoute) and routes.stays_within(entry) and entry.vrf in standing}
        self._entries = {key: self._as_put(entry) for key, entry in read.items()} | within
        return list(self._entries.values())

    async def forbidden(self) -> int:
        """How many packets the filters of the tunnels that stand have dropped, for a label that their peer may not send."""
        async with RouteSocket("labels") as netlink:
            links = await Devices.read(netlink)
            return await ingress.dropped(netlink, {links.indexes[tunnel_device(peer)] for peer in links.tunnels})

    # What stands

    def _standing_vrfs(self, links: Devices) -> dict[str, Vrf]:
        """Ours, and those on a device of somebody else's that were put."""
        put = {entry.name: entry for entry in self._entries.values() if isinstance(entry, Vrf)}
        borrowed = {name: vrf for name, vrf in put.items() if name not in links.vrfs and links.stands(vrf)}
        return {name: put[name] if name in put and links.stands(put[name]) else vrf for name, vrf in links.vrfs.items()} | borrowed

    def _as_put(self, entry: NodeEntry) -> NodeEntry:
        known = self._entries.get(entry.key)
        return known if known is not None and _as_told(known) == _as_told(entry) else entry

    def _vrf(self, name: str) -> Vrf:
        """KernelError, ENODEV when there is none."""
        entry = self._entries.get(Key("vrf", (name,)))
        if not isinstance(entry, Vrf):
            raise KernelError(errno.ENODEV, f"there is no VRF {name}")
        return entry

    # One entry

    async def _put(self, netlink: AsyncIPRoute, entry: NodeEntry, *, ours: bool) -> bool:
        """Whether a device is there that was not. `ours`: a route of that key may be replaced."""
        match entry:
            case Vrf():
                made = await devices.put_vrf(netlink, entry)
                if made:
                    await routes.clear_table(netlink, entry.table)
                await routes.end_table(netlink, entry.table, ended=True)
                return made
            case Tunnel():
                return await devices.put_tunnel(netlink, entry)
            case Peer():
                await ingress.admit(netlink, entry)
            case LabelBinding() | VrfRoute():
                if not (isinstance(entry, VrfRoute) and routes.stays_within(entry)):
                    await routes.put_route(netlink, entry, self._vrf, ours=ours)
            case _:
                raise KernelError(errno.EOPNOTSUPP, "Linux sets the traffic class of labels that it pushes to 0")
        return False

    async def _delete(self, netlink: AsyncIPRoute, entry: NodeEntry) -> None:
        match entry:
            case Vrf():
                await devices.delete_vrf(netlink, entry)
                await routes.end_table(netlink, entry.table, ended=False)
            case Tunnel():
                await devices.delete_tunnel(netlink, entry.peer)
            case Peer():
                ingress.gate(entry.name, open_=False)
            case LabelBinding() | VrfRoute() if not (isinstance(entry, VrfRoute) and routes.stays_within(entry)):
                await routes.delete_route(netlink, entry, self._vrf)


def _rests_upon(entry: NodeEntry, device: NodeEntry) -> bool:
    match device, entry:
        case Tunnel(peer=name), Peer(name=other):
            return name == other
        case Tunnel(peer=name), LabelBinding() | VrfRoute():
            return any(path.next_hop == ToPeer(name) for path in entry.paths)
        case Vrf(name=name), VrfRoute() if entry.vrf == name:
            return True
        case Vrf(name=name), LabelBinding() | VrfRoute():
            return any(path.next_hop in (ToVrf(name), ToInterface(name)) for path in entry.paths)
    return False


def _as_told(entry: NodeEntry) -> NodeEntry:
    """As much of it as Linux tells."""
    match entry:
        case Tunnel():
            return replace(entry, managed=False)
        case LabelBinding():
            return replace(entry, paths=tuple(_path_as_told(path) for path in entry.paths))
        case VrfRoute():
            return replace(entry, paths=tuple(_path_as_told(path if path.labels else replace(path, ttl=TtlModel.UNIFORM)) for path in entry.paths))
    return entry


def _path_as_told(path: Nhlfe) -> Nhlfe:
    hop = ToVrf(path.next_hop.vrf) if isinstance(path.next_hop, ToInterface) else path.next_hop
    return Nhlfe(hop, path.labels, TtlModel.UNIFORM if path.ttl is TtlModel.UNIFORM else TtlModel.PIPE)
